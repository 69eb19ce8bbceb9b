"""One tiny detector of each family, trained on the same few objects: students and teachers of every pair."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from detectors.tiny import tiny_dense, tiny_detector
from detectors.transformers.tiny import tiny_query_detector
from torch import Tensor, nn

from tardkd.detectors import for_model

NAMES = ["disc", "box", "bar"]
SIDE = 64

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]

# Of each family a builder and the steps of Adam after which a detector is right about the planted objects.
FAMILIES: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "faster_rcnn": (lambda **options: tiny_detector(**options), 300),
    "retinanet": (lambda **options: tiny_dense("retinanet", **options), 150),
    "fcos": (lambda **options: tiny_dense("fcos", **options), 150),
    "ssd": (lambda **options: tiny_dense("ssd", **options), 150),
    "rt_detr_v2": (lambda **options: tiny_query_detector("rt_detr_v2", **options), 200),
    "d_fine": (lambda **options: tiny_query_detector("d_fine", **options), 200),
}


def planted() -> Batch:
    """Two images of one size with bright objects, a colour for each class, on noise."""
    generator = torch.Generator().manual_seed(0)
    images = [0.2 * torch.rand(3, SIDE, SIDE, generator=generator) for _ in range(2)]
    boxes = [
        torch.tensor([[6.0, 8.0, 30.0, 34.0], [34.0, 30.0, 60.0, 58.0]]),
        torch.tensor([[16.0, 12.0, 48.0, 44.0]]),
    ]
    labels = [torch.tensor([1, 3]), torch.tensor([2])]
    for image, of_image, classes in zip(images, boxes, labels):
        for (x1, y1, x2, y2), label in zip(of_image.int().tolist(), classes.tolist()):
            image[label - 1, y1:y2, x1:x2] += 0.8
    return images, [{"boxes": of_image, "labels": classes} for of_image, classes in zip(boxes, labels)]


@cache
def _trained_state(family: str, seed: int, steps: int) -> dict[str, Any]:
    model = build(family, seed)
    detector = for_model(model)
    model.train()
    batch = detector.read_call(*planted())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.stack(list(detector.call(batch)[1].values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    return copy.deepcopy(model.state_dict())


def build(family: str, seed: int = 0) -> nn.Module:
    """A detector of three classes with random weights."""
    builder, _ = FAMILIES[family]
    return builder(seed=seed)


def trained(family: str, seed: int = 0, share: float = 1.0) -> nn.Module:
    """The same after ``share`` of the steps that teach it the planted objects."""
    model = build(family, seed)
    model.load_state_dict(_trained_state(family, seed, round(share * FAMILIES[family][1])))
    return model
