"""Torchvision detectors that are quick on a CPU: any family, channels, levels, strides and input size."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

FAMILIES = {"faster": FasterRCNN, "mask": MaskRCNN, "keypoint": KeypointRCNN}


class TinyBackbone(nn.Module):
    """Strided convolutions and an FPN; the first level has stride ``2 ** first``."""

    def __init__(self, channels: int, levels: int, first: int) -> None:
        super().__init__()
        self.out_channels = channels
        self.first = first
        widths = [3] + [8] * (first + levels - 1)
        self.body = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths))
        self.fpn = FeaturePyramidNetwork([8] * levels, channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for depth, layer in enumerate(self.body, start=1):
            x = torch.relu(layer(x))
            if depth >= self.first:
                maps[str(depth - self.first)] = x
        return self.fpn(maps)


def tiny_detector(
    family: str = "faster",
    *,
    seed: int = 0,
    num_classes: int = 4,
    channels: int = 8,
    levels: int = 2,
    first: int = 2,
    size: int = 64,
    output_size: int = 3,
    sampling_ratio: int = 2,
    **options: Any,
) -> nn.Module:
    """A detector with random weights; ``num_classes`` includes the background."""
    torch.manual_seed(seed)
    if family == "keypoint":
        num_classes = 2
        options["keypoint_head"] = KeypointRCNNHeads(channels, (8,))
        options["keypoint_predictor"] = KeypointRCNNPredictor(8, 3)
    if family == "mask":
        options["mask_head"] = MaskRCNNHeads(channels, (8,), 1)
    names = [str(level) for level in range(levels)]
    # Images of 64 pixels hold boxes of all levels where 48 take the place of the usual 224.
    pool = MultiScaleRoIAlign(names, output_size, sampling_ratio, canonical_scale=48)
    options = {
        "min_size": size,
        "max_size": 2 * size,
        "rpn_anchor_generator": AnchorGenerator(
            tuple((2.0 ** (first + level + 3),) for level in range(levels)), ((0.5, 1.0, 2.0),) * levels
        ),
        "box_roi_pool": pool,
        "box_head": TwoMLPHead(channels * output_size**2, 16),
        "rpn_pre_nms_top_n_train": 120,
        "rpn_post_nms_top_n_train": 60,
        "rpn_pre_nms_top_n_test": 80,
        "rpn_post_nms_top_n_test": 40,
        "box_batch_size_per_image": 16,
        "box_fg_iou_thresh": 0.3,
        "box_bg_iou_thresh": 0.3,
        **options,
    }
    model = FAMILIES[family](TinyBackbone(channels, levels, first), num_classes, **options)
    model.roi_heads.box_predictor = FastRCNNPredictor(16, num_classes)
    if family == "mask":
        model.roi_heads.mask_predictor = MaskRCNNPredictor(8, 8, num_classes)
    return model


DENSE = ("retinanet", "fcos", "ssd")


def tiny_dense(
    family: str,
    *,
    seed: int = 0,
    num_classes: int = 4,
    channels: int = 8,
    levels: int = 2,
    size: int = 64,
    kind: type[nn.Module] | None = None,
    **options: Any,
) -> nn.Module:
    """A one-stage detector with random weights; ``num_classes`` includes the background, ``kind`` may be a subclass."""
    torch.manual_seed(seed)
    if family in ("ssd", "ssdlite"):
        ratios = [[2]] * levels
        scales = [0.25 * 2**level for level in range(levels)] + [1.0]
        backbone = UnevenBackbone(channels, levels)
        if family == "ssdlite":
            options["head"] = SSDLiteHead(backbone.out_channels, [4] * levels, num_classes, nn.BatchNorm2d)
        model = (kind or SSD)(
            backbone, DefaultBoxGenerator(ratios, scales=scales), (size, size), num_classes, **options
        )
    else:
        if family == "fcos":
            channels = 32  # its head normalises groups of so many
        sizes = [(2.0 ** (level + 2),) for level in range(levels)]
        if family == "retinanet":
            sizes = [(5 * small, 7 * small) for (small,) in sizes]
        shapes = ((1.0,),) * levels if family == "fcos" else ((0.5, 1.0, 2.0),) * levels
        model = (kind or {"retinanet": RetinaNet, "fcos": FCOS}[family])(
            TinyBackbone(channels, levels, 2),
            num_classes,
            min_size=size,
            max_size=2 * size,
            anchor_generator=AnchorGenerator(tuple(sizes), shapes),
            **options,
        )
    for name, weight in model.named_parameters():  # a fresh head says the same of everything
        if name.startswith("head") and weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


class UnevenBackbone(nn.Module):
    """Levels with channels of their own, and the second not half as large as the first, as SSD has them."""

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.out_channels = [channels + 4 * level for level in range(levels)]
        widths = [3, *self.out_channels]
        strides = [8, *([3] * (levels - 1))]
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=stride, padding=1)
            for (before, after), stride in zip(itertools.pairwise(widths), strides)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for level, layer in enumerate(self.layers):
            x = torch.relu(layer(x))
            maps[str(level)] = x
        return maps


def tiny_batch(
    family: str = "faster", seed: int = 0, empty: bool = False
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different sizes with two boxes and one; with ``empty`` the second image has none."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, 64, 80, generator=generator), torch.rand(3, 72, 64, generator=generator)]
    boxes = [
        torch.tensor([[6.0, 8.0, 40.0, 44.0], [30.0, 20.0, 70.0, 60.0]]),
        torch.tensor([[10.0, 5.0, 50.0, 60.0]]),
    ]
    labels = [torch.tensor([1, 3]), torch.tensor([2])]
    if empty:
        boxes[1], labels[1] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    targets = [{"boxes": of_image, "labels": classes} for of_image, classes in zip(boxes, labels)]
    for image, target in zip(images, targets):
        count = len(target["boxes"])
        if family == "mask":
            target["masks"] = torch.ones((count, *image.shape[-2:]), dtype=torch.uint8)
        if family == "keypoint":
            target["labels"] = target["labels"].clamp(max=1)
            center = (target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2
            visible = torch.ones(count, 3, 1)
            target["keypoints"] = torch.cat([center[:, None].expand(count, 3, 2), visible], dim=2)
    return images, targets
