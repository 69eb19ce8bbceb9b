"""One tiny detector of each family, and what it has learnt of a few planted objects: for all pairs.

What trains in seconds is trained by the tests. The detectors with queries take minutes: their weights are kept beside
this file, and ``python families.py`` in this folder, with tests/ on the path, makes them anew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from detectors.tiny import tiny_dense, tiny_detector
from detectors.transformers.tiny import tiny_query_detector
from torch import Tensor, nn

from tardkd.detectors import for_model

NAMES = ["disc", "box", "bar"]
SIDE = 64
KEPT = Path(__file__).parent / "query_detectors.pt"

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


@dataclass(frozen=True)
class Family:
    """How a detector of it is built, and how many steps it needs."""

    builder: Callable[..., nn.Module]
    begun: int  # steps after which it knows something of the objects
    trained: int  # steps after which it is right about them
    rate: float = 3e-3
    is_kept: bool = False  # whether its weights are in a file


FAMILIES = {
    "faster_rcnn": Family(lambda seed: tiny_detector(seed=seed), 150, 300),
    "retinanet": Family(lambda seed: tiny_dense("retinanet", seed=seed), 60, 150),
    "fcos": Family(lambda seed: tiny_dense("fcos", seed=seed), 22, 150),
    "ssd": Family(lambda seed: tiny_dense("ssd", seed=seed), 45, 150),
    "rt_detr_v2": Family(lambda seed: tiny_query_detector("rt_detr_v2", seed=seed), 300, 700, 1e-3, is_kept=True),
    "d_fine": Family(lambda seed: tiny_query_detector("d_fine", seed=seed), 300, 700, 1e-3, is_kept=True),
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


def build(family: str, seed: int = 0) -> nn.Module:
    """A detector of three classes with random weights."""
    return FAMILIES[family].builder(seed)


def begun(family: str) -> nn.Module:
    """The one of seed 0, which has begun to learn the planted objects."""
    return _with_state(family, 0, FAMILIES[family].begun)


def trained(family: str) -> nn.Module:
    """The one of seed 1, which has learnt them."""
    return _with_state(family, 1, FAMILIES[family].trained)


def _with_state(family: str, seed: int, steps: int) -> nn.Module:
    model = build(family, seed)
    states = _kept()[family] if FAMILIES[family].is_kept else {steps: _train(family, seed, steps)}
    model.load_state_dict(states[steps])
    return model


@cache
def _kept() -> dict[str, dict[int, dict[str, Any]]]:
    return torch.load(KEPT, weights_only=True)


@cache
def _train(family: str, seed: int, steps: int) -> dict[str, Any]:
    model = build(family, seed).train()
    detector = for_model(model)
    batch = detector.read_call(*planted())
    optimizer = torch.optim.Adam(model.parameters())
    torch.manual_seed(seed)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = FAMILIES[family].rate * min(1.0, step / 20)
        optimizer.zero_grad()
        torch.stack(list(detector.call(batch)[1].values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    return copy.deepcopy(model.state_dict())


def _keep() -> None:
    def half(state: dict[str, Any]) -> dict[str, Any]:
        return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}

    families = {name: family for name, family in FAMILIES.items() if family.is_kept}
    torch.save(
        {
            name: {steps: half(_train(name, seed, steps)) for seed, steps in ((0, family.begun), (1, family.trained))}
            for name, family in families.items()
        },
        KEPT,
    )


if __name__ == "__main__":
    _keep()
