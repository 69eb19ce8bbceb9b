"""Views that change an image by much: what they do without objects, on tiny images, on resume, and for the teacher."""

from __future__ import annotations

import pytest
import torch
from train.recipe import MODEL

from tardkd.data import Scenes, build_loader, build_transform
from tardkd.detectors.base import Batch
from tardkd.detectors.torchvision import GeneralizedRCNNDetector
from tardkd.train.models import ModelSpec, build_model

BOXES = torch.tensor([[20.0, 8, 50, 28], [2, 30, 12, 38]])


def target_of(boxes: torch.Tensor) -> dict:
    return {
        "boxes": boxes,
        "labels": torch.arange(1, len(boxes) + 1),
        "image_id": 5,
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(1),
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"iou_crop": True},
        {"large_scale_jitter": (0.1, 2)},
        {"zoom_out": 4},
        {"iou_crop": True, "large_scale_jitter": (0.1, 2), "zoom_out": 4},
    ],
)
def test_no_objects_and_tiny_images(settings):
    transform = build_transform(**settings)
    for height, width, boxes in (
        (40, 60, BOXES[:0]),
        (1, 3, BOXES[:1] / 50),
        (2, 2, BOXES[:1] / 50),
        (3, 40, BOXES[:1] / 50),
    ):
        for seed in range(10):
            torch.manual_seed(seed)
            view, moved = transform(torch.zeros(3, height, width, dtype=torch.uint8), target_of(boxes))
            assert min(view.shape) > 0 and len(moved["boxes"]) == len(moved["labels"]) <= len(boxes)


def test_all_together_depend_on_seed_epoch_and_image_alone():
    scenes = Scenes(
        6,
        64,
        0,
        build_transform(scale=(0.8, 1.2), photometric=True, zoom_out=2, iou_crop=True, large_scale_jitter=(0.5, 2)),
    )

    def seen(**settings) -> dict:
        loader = build_loader(scenes, **{"batch_size": 2, "shuffle": True, "seed": 1, "epoch": 3, **settings})
        return {
            target["image_id"]: (image, target["boxes"])
            for images, targets in loader
            for image, target in zip(images, targets)
        }

    first = seen()
    for other in (seen(workers=1), seen(batch_size=3), seen(groups=[0, 1] * 3)):
        assert other.keys() == first.keys()
        for image_id, (image, boxes) in first.items():
            assert torch.equal(image, other[image_id][0]) and torch.equal(boxes, other[image_id][1])
    assert not all(torch.equal(first[i][0], image) for i, (image, _) in seen(epoch=4).items())


@pytest.mark.parametrize("teacher_size", [64, 96])
def test_of_several_sizes_the_teacher_sees_the_one_that_the_student_drew(teacher_size):
    student = GeneralizedRCNNDetector(build_model(ModelSpec(**{**MODEL, "min_size": (32, 48, 64), "max_size": 128}), 2))
    teacher = GeneralizedRCNNDetector(build_model(ModelSpec(**{**MODEL, "min_size": teacher_size, "max_size": 192}), 2))
    teacher.model.eval()
    ratio = teacher.input_size / student.input_size
    image, target = torch.rand(3, 40, 60), {"boxes": BOXES, "labels": torch.tensor([1, 2])}
    drawn = set()
    for seed in range(6):
        torch.manual_seed(seed)
        inputs = student.student_pass(Batch([image], [target])).inputs
        drawn.add(min(inputs.sizes[0]))
        batch, *_ = teacher.teacher_pass([image], inputs, ratio).state
        assert batch.image_sizes[0] == tuple(round(side * ratio) for side in inputs.sizes[0])
        if ratio == 1:
            assert torch.equal(batch.tensors, inputs.tensor)
    assert len(drawn) > 1
