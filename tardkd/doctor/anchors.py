"""Whether the student's anchors fit the objects: what no anchor overlaps well is hard to propose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tardkd.detectors.anchors import Anchors, anchors_of, input_scale
from tardkd.distill.findings import Finding, ok, warning

from .subject import Subject

IOU = 0.5
MANY = 0.2  # share of objects without such an anchor


def check_anchors(subject: Subject) -> Iterator[Finding]:
    """The training boxes, resized as the student resizes images, without the random views."""
    student = subject.distiller.student
    boxes, limits = _boxes(subject.train_set, student)
    if not len(boxes):
        return
    anchors = anchors_of(student)
    sides = boxes[:, 2:].prod(dim=1).sqrt()
    low, middle, high = _quantiles(sides, [0.1, 0.5, 0.9])
    unmatched = _unmatched(boxes, limits, anchors)
    text = (
        f"objects of {low:.0f}, {middle:.0f}, {high:.0f} pixels (10, 50, 90 %) in the student's input, anchors of "
        f"{', '.join(map(_sizes, anchors.sizes))}; {unmatched:.0%} meet no anchor with IoU >= {IOU:g}"
    )
    numbers = {"unmatched": unmatched, "sides": [low, middle, high]}
    if unmatched <= MANY:
        yield ok(text, **numbers)
        return
    is_light = subject.config.student.is_light
    better = _better_sizes(anchors, boxes, limits, sides, unmatched) if is_light else None
    yield warning(text, better or _advice(anchors, sides), **numbers)


def _better_sizes(anchors: Anchors, boxes: Tensor, limits: Tensor, sides: Tensor, unmatched: float) -> str | None:
    """Sizes for the recipe that are spread over those of the objects, where they leave fewer objects unmatched."""
    shares = torch.linspace(0.1, 0.9, len(anchors.sizes)).tolist()
    sizes = [max(1, round(side)) for side in _quantiles(sides, shares)]
    left = _unmatched(boxes, limits, anchors.resized(sizes))
    return f"student.anchor_sizes={sizes} would leave {left:.0%}" if left < unmatched else None


def _advice(anchors: Anchors, sides: Tensor) -> str:
    smallest, largest = min(map(min, anchors.sizes)), max(map(max, anchors.sizes))
    middle = float(sides.median())
    if middle < smallest:
        return "most objects are smaller than the smallest anchor: raise student.min_size and student.max_size"
    if middle > largest:
        return "most objects are larger than the largest anchor: lower student.min_size and student.max_size"
    return "their shapes may be the reason: anchors are 1:2, 1:1 and 2:1; expect fewer proposals on thin objects"


def _boxes(dataset: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
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
    centres = corners[:, :2] + corners[:, 2:] / 2
    scale = input_scale(model, limits)[:, None]
    return torch.cat([centres, corners[:, 2:]], dim=1) * scale, limits * scale


def _unmatched(boxes: Tensor, limits: Tensor, anchors: Anchors) -> float:
    """The share of `boxes` (G, 4), centre and size on images of `limits` (G, 2), that no anchor meets with ``IOU``."""
    return float((anchors.best_overlaps(boxes, limits) < IOU).float().mean())


def _quantiles(values: Tensor, shares: list[float]) -> list[float]:
    ordered = values.sort().values  # torch.quantile refuses more than 2^24 values
    return [float(ordered[round(share * (len(ordered) - 1))]) for share in shares]


def _sizes(sizes: Sequence[float]) -> str:
    return "/".join(f"{size:g}" for size in sizes)
