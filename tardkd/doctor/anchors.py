"""Whether the student's anchors fit the objects: what no anchor overlaps well is hard to propose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator

from tardkd.train.models import LIGHT

from .report import Finding, ok, warning
from .subject import Subject

IOU = 0.5
MANY = 0.2  # share of objects without such an anchor


def check_anchors(subject: Subject) -> Iterator[Finding]:
    """Of the training boxes, resized as the student resizes images, without the random views."""
    student = subject.distiller.student
    boxes, limits = _boxes(subject.train_set, student.transform)
    if not len(boxes):
        return
    generator, strides = student.rpn.anchor_generator, _strides(student)
    sides = boxes[:, 2:].prod(dim=1).sqrt()
    low, middle, high = _quantiles(sides, [0.1, 0.5, 0.9])
    unmatched = _unmatched(boxes, limits, generator, strides)
    text = (
        f"objects of {low:.0f}, {middle:.0f}, {high:.0f} pixels (10, 50, 90 %) in the student's input, anchors of "
        f"{', '.join(map(_sizes, generator.sizes))}; {unmatched:.0%} meet no anchor with IoU >= {IOU:g}"
    )
    if unmatched <= MANY:
        yield ok(text, unmatched=unmatched, sides=[low, middle, high])
    else:
        yield warning(
            text, _advice(subject, boxes, limits, sides, unmatched), unmatched=unmatched, sides=[low, middle, high]
        )


def _advice(subject: Subject, boxes: Tensor, limits: Tensor, sides: Tensor, unmatched: float) -> str:
    student = subject.distiller.student
    generator = student.rpn.anchor_generator
    if subject.config.student.name == LIGHT:
        shares = torch.linspace(0.1, 0.9, len(generator.sizes)).tolist()
        sizes = [max(1, round(side)) for side in _quantiles(sides, shares)]
        better = AnchorGenerator(tuple((size,) for size in sizes), generator.aspect_ratios)
        left = _unmatched(boxes, limits, better, _strides(student))
        if left < unmatched:
            return f"student.anchor_sizes={sizes} would leave {left:.0%}"
    smallest, largest = min(map(min, generator.sizes)), max(map(max, generator.sizes))
    middle = float(sides.median())
    if middle < smallest:
        return "most objects are smaller than the smallest anchor: raise student.min_size and student.max_size"
    if middle > largest:
        return "most objects are larger than the largest anchor: lower student.min_size and student.max_size"
    return "their shapes may be the reason: anchors are 1:2, 1:1 and 2:1; expect fewer proposals on thin objects"


def _boxes(dataset: Any, transform: nn.Module) -> tuple[Tensor, Tensor]:
    """Centre and size (G, 4) of all objects and (width, height) (G, 2) of their images, in the model's input pixels."""
    coco = dataset.coco
    objects = [
        annotation
        for annotation in coco.dataset["annotations"]
        if not annotation["iscrowd"] and min(annotation["bbox"][2:]) > 0
    ]
    images = [coco.imgs[annotation["image_id"]] for annotation in objects]
    corners = torch.tensor([annotation["bbox"] for annotation in objects], dtype=torch.float32).reshape(-1, 4)
    limits = torch.tensor([[image["width"], image["height"]] for image in images], dtype=torch.float32).reshape(-1, 2)
    short, long = limits.amin(dim=1), limits.amax(dim=1)
    scale = (transform.min_size[-1] / short).minimum(transform.max_size / long)[:, None]
    centres = corners[:, :2] + corners[:, 2:] / 2
    return torch.cat([centres, corners[:, 2:]], dim=1) * scale, limits * scale


def _unmatched(boxes: Tensor, limits: Tensor, generator: AnchorGenerator, strides: Sequence[float]) -> float:
    """The share of `boxes` (G, 4), centre and size, that no anchor meets with ``IOU``.

    Anchors stand on a grid from 0. Of one size and shape the one with the nearest centre overlaps most.
    """
    best = torch.zeros(len(boxes))
    for cells, stride in zip(generator.cell_anchors, strides, strict=True):
        cells = cells.detach().cpu().float()
        sizes, box_sizes = cells[:, 2:] - cells[:, :2], boxes[:, None, 2:]  # (A, 2), (G, 1, 2)
        steps = (boxes[:, :2] / stride).round().clamp(min=0).minimum(((limits - 1) / stride).floor())
        distance = (boxes[:, :2] - steps * stride).abs()[:, None]  # (G, 1, 2)
        shared = torch.minimum(torch.minimum(box_sizes, sizes), (box_sizes + sizes) / 2 - distance)
        shared = shared.clamp(min=0).prod(dim=-1)  # (G, A)
        iou = shared / (box_sizes.prod(dim=-1) + sizes.prod(dim=-1) - shared)
        best = best.maximum(iou.amax(dim=1))
    return float((best < IOU).float().mean())


def _strides(model: nn.Module) -> list[float]:
    """Input pixels per cell of every level that has anchors."""
    side = 256
    training = model.training
    model.eval()
    parameter = next(model.parameters())
    with torch.inference_mode():
        features = model.backbone(parameter.new_zeros(1, 3, side, side))
    model.train(training)
    return [side / level.shape[-1] for level in features.values()]


def _quantiles(values: Tensor, shares: list[float]) -> list[float]:
    ordered = values.sort().values  # torch.quantile refuses more than 2^24 values
    return [float(ordered[round(share * (len(ordered) - 1))]) for share in shares]


def _sizes(sizes: Sequence[float]) -> str:
    return "/".join(f"{size:g}" for size in sizes)
