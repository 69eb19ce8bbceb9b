"""The random choice of regions, made to depend on the step and the image alone.

Otherwise it would depend on what was drawn before: on which images share a process, and on where a run was resumed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork


class SeededSampler:
    """One of torchvision's samplers, its generator seeded for every image; torch's own is left as it was."""

    def __init__(self, sampler) -> None:
        self.sampler = sampler
        self.seeds: list[int] = []  # of the images that come next

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if len(self.seeds) != len(matched):
            return self.sampler(matched)  # not a step of ours
        chosen = []
        for seed, of_image in zip(self.seeds, matched):
            devices = [of_image.device] if of_image.is_cuda else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                chosen.append(self.sampler([of_image]))
        return [positive for (positive,), _ in chosen], [negative for _, (negative,) in chosen]


def seed_samplers(model: nn.Module) -> list[SeededSampler]:
    """Puts a :class:`SeededSampler` around each of the model's samplers, and returns them."""
    samplers = []
    for module in model.modules():
        if isinstance(module, (RegionProposalNetwork, RoIHeads)):
            module.fg_bg_sampler = SeededSampler(module.fg_bg_sampler)
            samplers.append(module.fg_bg_sampler)
    return samplers
