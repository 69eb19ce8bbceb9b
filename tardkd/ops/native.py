"""How tensors are described to the compiled module, which knows nothing of torch.

It takes addresses, dtypes, shapes and strides. Whoever calls it keeps the described tensors alive until it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar, overload

import torch
from torch import Tensor

# As in csrc/core/common.h. The last three are only ever expected in their one place, so that their code says nothing.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
DTYPE_CODES |= {torch.int32: -1, torch.int64: -1, torch.bool: -1}

Description = tuple[int, int, tuple[int, ...], tuple[int, ...]]  # address, dtype code, shape, strides
Named = TypeVar("Named", bound=tuple)


class DescribedPyramid(NamedTuple):
    levels: list[Description]  # (L,) of (N, C_l, H_l, W_l) maps
    scales: list[float]  # (L,)


@overload
def describe(tensor: Tensor) -> Description: ...


@overload
def describe(tensor: None) -> None: ...


def describe(tensor: Tensor | None) -> Description | None:
    """None for None: an optional tensor that is absent. An empty tensor has the address 0."""
    if tensor is None:
        return None
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tensor.shape, tensor.stride()


def describe_pyramid(features: Sequence[Tensor], scales: list[float]) -> DescribedPyramid:
    """``features``: L x (N, C_l, H_l, W_l). Without features: a gradient that is not wanted."""
    return DescribedPyramid([describe(feature) for feature in features], scales)


def describe_fields(tensors: Named) -> Named:
    """The same named tuple with a description in the place of every tensor; the module reads it by name."""
    return type(tensors)(*map(describe, tensors))
