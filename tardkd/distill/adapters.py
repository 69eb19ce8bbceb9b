"""Bring the student's channels to the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def make_adapter(student_channels: int, teacher_channels: int, like: Tensor) -> nn.Module:
    """(N, C_student, h, w) -> (N, C_teacher, h, w): identity or a 1x1 convolution.

    One convolution serves all levels: every level of a pyramid has the same channels, and regions that a box head has
    pooled come from all of them. To draw its first values leaves the random state of the training as it was.

    Args:
        like: a tensor of any shape, whose device and dtype the convolution gets.
    """
    if student_channels == teacher_channels:
        return nn.Identity()
    with torch.random.fork_rng(devices=[]):
        adapter = nn.Conv2d(student_channels, teacher_channels, kernel_size=1)
    return adapter.to(like)
