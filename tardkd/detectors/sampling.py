"""The random choice of regions in a training step, made to depend on the step and the image alone.

Otherwise it would depend on what was drawn before: on which images share a process, and on where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork

from .base import Detector

Chosen = tuple[list[Tensor], list[Tensor]]  # masks of the positive and of the negative regions: N x (R_n,)


class SeededSampler:
    """One of torchvision's samplers, its generator seeded for every image; torch's own is left as it was."""

    def __init__(self, sampler: Callable[[list[Tensor]], Chosen]) -> None:
        self.sampler = sampler
        self.seeds: Sequence[int] = ()  # one for each image of the next call

    def __call__(self, matched: list[Tensor]) -> Chosen:
        """`matched`: N x (R_n,), what each region of an image was matched with."""
        if len(self.seeds) != len(matched):
            return self.sampler(matched)  # a call outside a training step, which nobody has seeded
        chosen = []
        for seed, of_image in zip(self.seeds, matched):
            devices = [of_image.device] if of_image.is_cuda else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                chosen.append(self.sampler([of_image]))
        return [positive for (positive,), _ in chosen], [negative for _, (negative,) in chosen]


def region_count(detector: Detector) -> int | None:
    """How many regions of an image train the box head; None where there is nothing to choose."""
    sampler = _sampler(detector)
    return None if sampler is None else sampler.batch_size_per_image


@contextmanager
def fewer_regions(detector: Detector, count: int) -> Iterator[None]:
    """Let ``count`` regions of an image train the box head meanwhile."""
    sampler = _sampler(detector)
    before, sampler.batch_size_per_image = sampler.batch_size_per_image, count
    try:
        yield
    finally:
        sampler.batch_size_per_image = before


def _sampler(detector: Detector) -> Any:
    """The model's own sampler."""
    sampler = detector.region_sampler
    return sampler.sampler if isinstance(sampler, SeededSampler) else sampler


def seed_samplers(model: nn.Module) -> list[SeededSampler]:
    """Put a :class:`SeededSampler` around each of the model's samplers that has none yet, and return them all."""
    samplers = []
    for module in model.modules():
        if isinstance(module, (RegionProposalNetwork, RoIHeads)):
            if not isinstance(module.fg_bg_sampler, SeededSampler):
                module.fg_bg_sampler = SeededSampler(module.fg_bg_sampler)
            samplers.append(module.fg_bg_sampler)
    return samplers
