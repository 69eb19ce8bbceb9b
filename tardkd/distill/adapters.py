"""Bring the student's pyramid to the teacher's channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def pair_levels(student: Sequence[float], teacher: Sequence[float]) -> list[int]:
    """For each level of the teacher's pyramid the student's level whose stride is nearest, by their quotient.

    Args:
        student, teacher: strides of the levels, in pixels of the same image.
    """
    return [min(range(len(student)), key=lambda level: abs(math.log(student[level] / stride))) for stride in teacher]


def make_adapter(student_channels: int, teacher_channels: int, like: Tensor) -> nn.Module:
    """(N, C_student, h, w) -> (N, C_teacher, h, w): identity or a 1x1 convolution.

    To draw its first values leaves the random state of the training as it was.

    Args:
        like: a tensor of any shape, whose device and dtype the convolution gets.
    """
    if student_channels == teacher_channels:
        return nn.Identity()
    with torch.random.fork_rng(devices=[]):
        adapter = nn.Conv2d(student_channels, teacher_channels, kernel_size=1)
    return adapter.to(like)


def make_adapters(student_channels: Sequence[int], teacher_channels: Sequence[int], like: Tensor) -> nn.ModuleList:
    """One adapter a level, for pyramids whose channels differ from level to level; as :func:`make_adapter`."""
    return nn.ModuleList(make_adapter(*channels, like) for channels in zip(student_channels, teacher_channels))
