"""Memory for the CPU kernels' large results, kept from one training step to the next (csrc/cpu/memory.h)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .extension import native_module
from .maps import is_channels_last

LARGE = 2**20  # bytes; what is smaller malloc keeps by itself


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised, contiguous, on the CPU."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(native_module.Block(size), dtype=dtype).view(shape)  # holds the block


def empty_like(feature: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised, dense, (N, C, H, W) in the feature's memory format."""
    if not is_channels_last(feature):
        return empty(feature.shape, dtype)
    n, c, h, w = feature.shape
    return empty((n, h, w, c), dtype).permute(0, 3, 1, 2)


def empty_cache() -> int:
    """Gives the memory that the CPU kernels keep for the next gradients back to the system; returns its bytes.

    It is never more than they used at one time. (On a GPU torch's own allocator does this:
    :func:`torch.cuda.empty_cache`.)
    """
    return native_module.empty_cache()
