"""Bring the student's channels to the teacher's."""

from __future__ import annotations

import torch
from torch import nn


def make_adapters(student_channels: int, teacher_channels: int) -> nn.ModuleDict:
    """``{"feature": module}`` for (N, C_student, h, w) -> (N, C_teacher, h, w): identity, or a 1x1 convolution.

    One convolution serves all levels: every level of a pyramid has the same channels, and regions that a box head has
    pooled come from all of them. Its initial values leave the random state of the training as it was.
    """
    if student_channels == teacher_channels:
        return nn.ModuleDict({"feature": nn.Identity()})
    with torch.random.fork_rng(devices=[]):
        return nn.ModuleDict({"feature": nn.Conv2d(student_channels, teacher_channels, kernel_size=1)})
