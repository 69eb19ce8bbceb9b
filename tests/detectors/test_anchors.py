"""A detector's anchors as numbers."""

from __future__ import annotations

import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_convert, box_iou

from tardkd.detectors import for_model
from tardkd.detectors.anchors import Anchors

from .tiny import tiny_detector


def test_anchors_against_a_comparison_with_every_anchor():
    torch.manual_seed(0)
    generator = AnchorGenerator(((12,), (24,), (48,)), ((0.5, 1.0, 2.0),) * 3)
    corners = torch.rand(300, 2) * 80
    sides = torch.rand(300, 2) ** 2 * 70 + 4
    boxes = torch.cat([corners, corners + sides], dim=1).clamp(max=96)
    maps = [torch.zeros(1, 1, 96 // stride, 96 // stride) for stride in (4, 8, 16)]
    (every,) = generator(ImageList(torch.zeros(1, 3, 96, 96), [(96, 96)]), maps)
    overlaps = box_iou(boxes, every).amax(dim=1)
    assert 0.1 < (overlaps < 0.5).float().mean() < 0.9
    centred, limits = box_convert(boxes, "xyxy", "cxcywh"), torch.full((300, 2), 96.0)
    ours = Anchors(generator.sizes, generator.aspect_ratios, (4, 8, 16))
    torch.testing.assert_close(ours.best_overlaps(centred, limits), overlaps)


def test_the_strides_are_those_of_the_grid_that_the_model_proposes_from():
    model = tiny_detector().train()
    anchors = for_model(model).anchors
    assert model.training and anchors.sizes == model.rpn.anchor_generator.sizes
    image = torch.rand(1, 3, 64, 64)
    levels = list(model.backbone(image).values())
    (every,) = model.rpn.anchor_generator(ImageList(image, [(64, 64)]), levels)
    centres = box_convert(every, "xyxy", "cxcywh")[:, :2].split([level[0, 0].numel() * 3 for level in levels])
    assert len(anchors.strides) == len(levels)
    for of_level, stride in zip(centres, anchors.strides):
        assert of_level[:, 0].unique().diff().amin() == stride


def test_other_sizes_leave_shapes_and_places():
    anchors = Anchors(((8.0,), (16.0,)), ((1.0, 2.0),) * 2, (4.0, 8.0))
    assert anchors.resized([10, 20]) == Anchors(((10,), (20,)), ((1.0, 2.0),) * 2, (4.0, 8.0))
