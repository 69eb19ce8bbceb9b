"""The optimizer, and its learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from bisect import bisect_right

import torch
from torch import nn

from tardkd.train.config import Optimizer


def build_optimizer(settings: Optimizer, module: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("the model has no parameter to train")
    if settings.kind == "sgd":
        return torch.optim.SGD(parameters, settings.lr, settings.momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(parameters, settings.lr, weight_decay=settings.weight_decay)


def learning_rate(settings: Optimizer, step: int, steps_per_epoch: int, epochs: int) -> float:
    """The rate of global step `step` (from 0): linear warm-up times the schedule."""
    if settings.schedule == "multistep":
        factor = settings.gamma ** bisect_right(settings.milestones, step // steps_per_epoch)
    elif settings.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * step / (steps_per_epoch * epochs)))
    else:
        factor = 1.0
    if step < settings.warmup:
        progress = step / settings.warmup
        factor *= settings.warmup_factor * (1 - progress) + progress
    return settings.lr * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
