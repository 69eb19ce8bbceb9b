"""Uninitialised results of the ops, with the shapes, dtypes and strides that kernels and tracing agree on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import accumulation_dtype
from .inputs import DistributionCall, RegionCall, RegionResults, Wants
from .maps import is_channels_last


def gradient_like(feature: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, C, H, W), dense, in the feature's memory format."""
    memory_format = torch.channels_last if is_channels_last(feature) else torch.contiguous_format
    return torch.empty_like(feature, dtype=dtype, memory_format=memory_format)


def new_norms(features: Sequence[Tensor]) -> Tensor:
    """What standardises the channels of ``features``, L x (N, C_l, H_l, W_l), in one tensor; see RegionInputs."""
    size = 2 * sum(feature.shape[1] for feature in features)
    return features[0].new_empty((size,), dtype=accumulation_dtype(features[0].dtype))


def packed_pooled(features: Sequence[Tensor], regions: int, bins: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The gradient of pooled features as csrc/cuda takes it: (R, chunks of channels, bins, channels of a chunk).

    A chunk is 128 bytes; there are as many as the level with most channels needs.
    """
    chunk = 128 // dtype.itemsize
    chunks = -(-max(feature.shape[1] for feature in features) // chunk)
    return features[0].new_empty((regions, chunks, math.prod(bins), chunk), dtype=dtype)


def region_results(call: RegionCall, wants: Wants, grad_features: Tensor) -> RegionResults:
    """Everything that a region loss writes, of which the features' gradient is given."""
    inputs = call.inputs
    count, device = inputs.proposals.shape[0], inputs.proposals.device
    dtype = accumulation_dtype(inputs.student_logits.dtype)
    losses = ((count,), (1,)) if call.loss.reduction == "none" else ((), ())

    # With strides: of torch's ways to make a tensor this takes least time.
    def empty(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    def gradient(wanted: bool, tensor: Tensor) -> Tensor:
        return empty((rows := tensor.shape), (rows[1], 1)) if wanted else empty((0,), (1,))

    return RegionResults(
        feature=empty(*losses),
        classification=empty(*losses),
        regression=empty(*losses),
        gates=torch.empty_strided((count, 3), (3, 1), dtype=torch.bool, device=device),
        scores=empty((count, 4), (4, 1)),
        factors=empty((3,), (1,)),
        grad_logits=gradient(wants.logits, inputs.student_logits),
        grad_deltas=gradient(wants.deltas, inputs.student_deltas),
        grad_features=grad_features,
    )


def distribution_results(call: DistributionCall) -> tuple[Tensor, Tensor]:
    """The loss, () or (R,), and the factor () that the gradient of a reduced one is to be multiplied by."""
    student, dtype = call.student_distributions, accumulation_dtype(call.student_distributions.dtype)
    loss_shape = student.shape[:1] if call.reduction == "none" else ()
    return student.new_empty(loss_shape, dtype=dtype), student.new_empty((), dtype=dtype)
