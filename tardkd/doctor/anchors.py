"""Whether the student's anchors fit the objects: what no anchor overlaps well is hard to propose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tardkd.detectors import for_model
from tardkd.detectors.anchors import Anchors
from tardkd.distill.findings import Finding, ok, skipped, warning

from .subject import Subject

IOU = 0.5
MANY = 0.2  # share of objects without such an anchor


def check_anchors(subject: Subject) -> Iterator[Finding]:
    """The training boxes, resized as the student resizes images, without the random views."""
    student = subject.distiller.student
    anchors = for_model(student).anchors
    if anchors is None:
        yield skipped(f"a {type(student).__name__} has no anchors of fixed sizes on every level")
        return
    boxes, limits = _boxes(subject.train_set, student)
    if not len(boxes):
        return
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
    yield warning(text, _advice(anchors, boxes, limits, unmatched, subject.config.student.is_light), **numbers)


def _advice(anchors: Anchors, boxes: Tensor, limits: Tensor, unmatched: float, is_light: bool) -> str:
    """What would leave fewer than the ``unmatched`` share of the objects: other sizes, or a finer grid.

    Args:
        boxes: (G, 4) centre and size, in the student's input pixels.
        limits: (G, 2) width and height of the image that each box is on.
        is_light: whether a recipe can set the sizes of this student's anchors.
    """
    sides = boxes[:, 2:].prod(dim=1).sqrt()
    shares = torch.linspace(0.1, 0.9, len(anchors.sizes)).tolist()
    sizes = [max(1, round(side)) for side in _quantiles(sides, shares)]  # spread over those of the objects
    resized = _unmatched(boxes, limits, anchors.resized(sizes))
    finer = _unmatched(boxes, limits, anchors.everywhere())
    if is_light and resized < unmatched and resized <= finer:
        return f"student.anchor_sizes={sizes} would leave {resized:.0%}"
    smallest, largest = min(map(min, anchors.sizes)), max(map(max, anchors.sizes))
    middle = float(sides.median())
    if middle < smallest:
        return "most objects are smaller than the smallest anchor: raise student.min_size and student.max_size"
    if middle > largest:
        return "most objects are larger than the largest anchor: lower student.min_size and student.max_size"
    if finer < unmatched / 2:
        return (
            f"the anchors stand {_sizes(anchors.strides, ', ')} pixels apart, which is coarse for such objects: on a "
            f"finer grid the same anchors would leave {finer:.0%}. Raise student.min_size and student.max_size, or "
            "take a student with a finer pyramid"
        )
    if is_light and resized < unmatched:
        return f"student.anchor_sizes={sizes} would leave {resized:.0%}"
    ratios = ", ".join(f"{ratio:g}" for ratio in sorted({ratio for level in anchors.ratios for ratio in level}))
    return (
        f"their shapes may be the reason: anchors are {ratios} times as high as wide; expect fewer proposals on thin "
        "objects"
    )


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
    scale = for_model(model).input_scale(limits)
    return torch.cat([centres * scale, corners[:, 2:] * scale], dim=1), limits * scale


def _unmatched(boxes: Tensor, limits: Tensor, anchors: Anchors) -> float:
    """The share of `boxes` (G, 4), centre and size on images of `limits` (G, 2), that no anchor meets with ``IOU``."""
    return float((anchors.best_overlaps(boxes, limits) < IOU).float().mean())


def _quantiles(values: Tensor, shares: list[float]) -> list[float]:
    ordered = values.sort().values  # torch.quantile refuses more than 2^24 values
    return [float(ordered[round(share * (len(ordered) - 1))]) for share in shares]


def _sizes(sizes: Sequence[float], between: str = "/") -> str:
    return between.join(f"{size:g}" for size in sizes)
