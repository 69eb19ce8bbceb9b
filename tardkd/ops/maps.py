"""A pyramid of gradient maps in one flat tensor: one launch fills, scales or casts all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    sizes: list[int]  # N, C, H, W of every level, one after the other
    channels_last: list[bool]  # of every level; else NCHW


def channels_differ(features: Sequence[Tensor]) -> bool:
    """Whether the levels of a pyramid, L x (N, C_l, H_l, W_l), have different numbers of channels."""
    return any(feature.shape[1] != features[0].shape[1] for feature in features)


def is_channels_last(feature: Tensor) -> bool:
    return not feature.is_contiguous() and feature.is_contiguous(memory_format=torch.channels_last)


def layout_of(features: Sequence[Tensor]) -> Layout:
    """Maps of the features' shapes and, as far as they are dense, memory formats."""
    return Layout([size for f in features for size in f.shape], [is_channels_last(f) for f in features])


def _levels(sizes: Sequence[int]) -> list[Sequence[int]]:
    return [sizes[i : i + 4] for i in range(0, len(sizes), 4)]


def flat_size(sizes: Sequence[int]) -> int:
    """Elements of the flat tensor."""
    return sum(n * c * h * w for n, c, h, w in _levels(sizes))


def maps_of(flat: Tensor, sizes: Sequence[int], channels_last: Sequence[bool]) -> list[Tensor]:
    """The flat tensor's (N, C, H, W) maps. They are as well aligned as it is where four divides the channels."""
    levels = _levels(sizes)
    parts = flat.split_with_sizes([n * c * h * w for n, c, h, w in levels])
    return [
        part.view(n, h, w, c).permute(0, 3, 1, 2) if last else part.view(n, c, h, w)
        for part, (n, c, h, w), last in zip(parts, levels, channels_last)
    ]
