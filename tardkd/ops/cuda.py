"""The registered ops on CUDA devices: allocate results and scratch memory, hand everything to the native module.

Nothing here waits for the device: sizes follow from shapes, and what depends on data is decided by the kernels. They
read every tensor where it lies, in any floating dtype and of any strides; only pooled features whose bins are not one
axis, and the upstream gradient of RoIAlign, are made contiguous first. With
``torch.use_deterministic_algorithms(True)`` feature gradients are gathered in a fixed order; otherwise atomics scatter
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import accumulation_dtype
from .inputs import (
    AlignBackward,
    AlignCall,
    DistributionBackward,
    DistributionCall,
    GaussianBackward,
    GaussianCall,
    RegionCall,
    RegionResults,
    Wants,
)
from .maps import Layout, flat_size, layout_of, maps_of
from .native import Description, describe, describe_fields, describe_pyramid
from .results import distribution_results, gradient_like, new_norms, region_results
from .spec import NORM_EPSILON


class Target(NamedTuple):
    """Where to run."""

    device: int  # index
    stream: int  # a cudaStream_t of that device


class Scratch(NamedTuple):
    """Memory in which the blocks of one launch add up what they found."""

    done: Description  # int32, of which the first is zero
    partial: Description  # (partials,)


class CudaKernels:
    """Implements :class:`tardkd.ops.kernels.Kernels` by the functions of ``module`` (csrc/cuda_bindings.cpp).

    ``stream_of`` names the stream of a device that the launches are to be queued on.
    """

    def __init__(self, module: ModuleType, stream_of: Callable[[torch.device], int]) -> None:
        self._module = module
        self._stream_of = stream_of

    def defers(self, call: RegionCall) -> bool:
        """Pooled regions are read once more in the backward pass: no more bytes, and no gradient to keep until then."""
        return call.pooling is None and bool(call.student_features)

    def adds(self, call: RegionCall) -> bool:
        """Even if all regions are open, they read less than what a pyramid's fill, multiplication and addition move."""
        return True

    def _target(self, device: torch.device) -> Target:
        return Target(device.index or 0, self._stream_of(device))

    def region_distill(self, call: RegionCall, wants: Wants, upstream: Tensor | None) -> RegionResults:
        assert call.pooling is not None, "region_distill pools from pyramids"
        first, proposals, pooling = call.student_features[0], call.inputs.proposals, call.pooling
        count, dtype = proposals.shape[0], accumulation_dtype(first.dtype)
        channels = max(feature.shape[1] for feature in call.student_features)
        layout = layout_of(call.student_features if wants.features else [])
        size = flat_size(layout.sizes)
        grad_pooled = None
        if gathers := wants.features and torch.are_deterministic_algorithms_enabled():
            grad_pooled = first.new_empty((count, channels, *pooling.align.output_size), dtype=dtype)
        counts = [0 if gathers else size, self._module.region_partials(count, channels), 1]
        gradient, partial, done = zeros(first.device, dtype, counts)
        results = region_results(call, wants, gradient)
        maps = [] if gathers else maps_of(gradient, *layout)
        self._launch_regions(call, upstream, results, maps, grad_pooled, scratch(done, partial))
        if grad_pooled is None:
            return through_norms(results, call, layout)
        levels, scales = call.inputs.student_levels, pooling.student_scales
        backward = AlignBackward(grad_pooled, proposals, levels, layout, scales, pooling.align)
        results = results._replace(grad_features=self._gather(backward, dtype, results.gates))
        return through_norms(results, call, layout)

    def region_distill_add(
        self, gradients: list[Tensor], call: RegionCall, wants: Wants, upstream: Tensor | None
    ) -> None:
        if torch.are_deterministic_algorithms_enabled():
            flat = self.region_distill(call, wants, upstream).grad_features
            for gradient, term in zip(gradients, maps_of(flat, *layout_of(call.student_features))):
                gradient += term
            return
        first, count = call.student_features[0], call.inputs.proposals.shape[0]
        partials = self._module.region_partials(count, max(feature.shape[1] for feature in call.student_features))
        partial, done = zeros(first.device, accumulation_dtype(first.dtype), [partials, 1])
        results = region_results(call, wants, partial[:0])
        self._launch_regions(call, upstream, results, gradients, None, scratch(done, partial))

    def _launch_regions(
        self,
        call: RegionCall,
        upstream: Tensor | None,
        results: RegionResults,
        gradients: list[Tensor],
        grad_pooled: Tensor | None,
        scratch: Scratch,
    ) -> None:
        """Write the ``results``, and add to the ``gradients``, L x (N, C_l, H_l, W_l), or write ``grad_pooled``."""
        assert call.pooling is not None, "region_distill pools from pyramids"
        self._module.region_distill(
            describe_pyramid(call.student_features, call.pooling.student_scales),
            describe_pyramid(call.teacher_features, call.pooling.teacher_scales),
            describe_pyramid(gradients, call.pooling.student_scales),
            describe(grad_pooled),
            describe_fields(call.inputs),
            describe(upstream),
            describe_fields(results),
            scratch,
            call.pooling.align,
            call.loss,
            self._target(call.student_features[0].device),
        )

    def pooled_distill(self, call: RegionCall, wants: Wants, upstream: Tensor | None) -> RegionResults:
        [student], [teacher] = call.student_features, call.teacher_features
        dtype = accumulation_dtype(student.dtype)
        gradient = gradient_like(student, dtype) if wants.features else student.new_empty((0,), dtype=dtype)
        counts = [self._module.region_partials(student.shape[0], 1), 1]
        partial, done = zeros(student.device, dtype, counts)
        results = region_results(call, wants, gradient)
        student, teacher = as_bins(student), as_bins(teacher)
        self._module.pooled_distill(
            describe(student),
            describe(teacher),
            describe(gradient) if wants.features else None,
            describe_fields(call.inputs),
            describe(upstream),
            describe_fields(results),
            scratch(done, partial),
            call.loss,
            self._target(student.device),
        )
        return through_norms(results, call, None)

    def channel_norms(self, features: list[Tensor]) -> Tensor:
        norms = new_norms(features)
        of_levels = norms.split_with_sizes([2 * feature.shape[1] for feature in features])
        for feature, norm in zip(features, of_levels):
            if feature.numel() == 0:  # of nothing there are no statistics, and nothing will ask for them
                continue
            wide = feature.to(norms.dtype)
            scale, mean = norm.chunk(2)
            variance, average = torch.var_mean(wide, CHANNEL_AXES, correction=0)
            torch.rsqrt(variance + NORM_EPSILON, out=scale)
            mean.copy_(average)
        return norms

    def head_distill(self, call: RegionCall, wants: Wants, upstream: Tensor | None) -> RegionResults:
        proposals, dtype = call.inputs.proposals, accumulation_dtype(call.inputs.student_logits.dtype)
        partial, done = zeros(proposals.device, dtype, [self._module.region_partials(proposals.shape[0], 1), 1])
        results = region_results(call, wants, proposals.new_empty((0,), dtype=dtype))
        self._module.head_distill(
            describe_fields(call.inputs),
            describe(upstream),
            describe_fields(results),
            scratch(done, partial),
            call.loss,
            self._target(proposals.device),
        )
        return results

    def roi_align(self, *packed: Any) -> Tensor:
        call = AlignCall.unpack(packed)
        first, proposals = call.features[0], call.proposals
        pooled = first.new_empty((proposals.shape[0], first.shape[1], *call.align.output_size))
        self._module.roi_align(
            describe_pyramid(call.features, call.scales),
            describe(proposals),
            describe(call.levels),
            describe(pooled),
            call.align,
            self._target(pooled.device),
        )
        return pooled

    def roi_align_backward(self, *packed: Any) -> Tensor:
        backward = AlignBackward.unpack(packed)
        backward = backward._replace(grad_pooled=backward.grad_pooled.contiguous())
        grad_pooled = backward.grad_pooled
        if torch.are_deterministic_algorithms_enabled():
            return self._gather(backward, grad_pooled.dtype)
        size, dtype = flat_size(backward.layout.sizes), accumulation_dtype(grad_pooled.dtype)
        gradient = grad_pooled.new_zeros((size,), dtype=dtype)
        self._module.roi_align_scatter(
            describe_pyramid(maps_of(gradient, *backward.layout), backward.scales),
            describe(backward.proposals),
            describe(backward.levels),
            describe(grad_pooled),
            backward.align,
            self._target(grad_pooled.device),
        )
        return gradient.to(grad_pooled.dtype)

    def _gather(self, backward: AlignBackward, dtype: torch.dtype, gates: Tensor | None = None) -> Tensor:
        """The maps' gradient, flat, in ``dtype``: of all regions, or of those with an open feature gate.

        Args:
            gates: (R, 3) bool; None: all are open.
        """
        grad_pooled, proposals, levels, layout, scales, align = backward
        gradient = grad_pooled.new_empty((flat_size(layout.sizes),), dtype=dtype)
        windows = proposals.new_empty((6 * proposals.shape[0],), dtype=torch.int32)
        self._module.roi_align_gather(
            describe_pyramid(maps_of(gradient, *layout), scales),
            describe(proposals),
            describe(levels),
            describe(gates),
            describe(grad_pooled),
            describe(windows),
            align,
            self._target(proposals.device),
        )
        return gradient

    def gaussian_feature_loss(self, *packed: Any) -> tuple[Tensor, Tensor]:
        call = GaussianCall.unpack(packed)
        boxes, student = call.gt_boxes, describe_pyramid(call.student_features, call.scales)
        loss = boxes.new_empty((), dtype=accumulation_dtype(call.student_features[0].dtype))
        mask_sums = boxes.new_empty((len(call.scales),), dtype=torch.float64)
        partial, done = zeros(boxes.device, torch.float64, [self._module.gaussian_partials(student), 1])
        self._module.gaussian_feature_loss(
            student,
            describe_pyramid(call.teacher_features, call.scales),
            describe(boxes),
            call.sigma_squared,
            scratch(done, partial),
            describe(mask_sums),
            describe(loss),
            self._target(boxes.device),
        )
        return loss, mask_sums

    def gaussian_feature_loss_backward(self, *packed: Any) -> list[Tensor]:
        call, mask_sums, upstream = GaussianBackward.unpack(packed)
        gradients = [gradient_like(feature, feature.dtype) for feature in call.student_features]
        self._module.gaussian_feature_loss_backward(
            describe_pyramid(call.student_features, call.scales),
            describe_pyramid(call.teacher_features, call.scales),
            describe_pyramid(gradients, call.scales),
            describe(call.gt_boxes),
            call.sigma_squared,
            describe(mask_sums),
            describe(upstream),
            self._target(mask_sums.device),
        )
        return gradients

    def distribution_distill_loss(self, *packed: Any) -> tuple[Tensor, Tensor]:
        call = DistributionCall(*packed)
        loss, factor = distribution_results(call)
        partial, done = zeros(loss.device, loss.dtype, [4 * call.gates.shape[0], 1])
        self._module.distribution_distill_loss(
            *(describe(tensor) for tensor in call.tensors()),
            call.temperature,
            call.reduction,
            scratch(done, partial),
            describe(loss),
            describe(factor),
            self._target(loss.device),
        )
        return loss, factor

    def distribution_distill_loss_backward(self, *packed: Any) -> Tensor:
        call, upstream = DistributionBackward.unpack(packed)
        student = call.student_distributions
        gradient = student.new_empty(student.shape, dtype=accumulation_dtype(student.dtype))
        self._module.distribution_distill_loss_backward(
            *(describe(tensor) for tensor in call.tensors()),
            call.temperature,
            call.reduction,
            describe(upstream),
            describe(gradient),
            self._target(student.device),
        )
        return gradient.to(student.dtype)


CHANNEL_AXES = (0, 2, 3)  # of (N, C, H, W): what the statistics of a channel are over


def through_norms(results: RegionResults, call: RegionCall, layout: Layout | None) -> RegionResults:
    """The kernels' gradient for standardised features becomes that for the features, in place.

    With x' = scale (x - mean) it is scale (g - mean(g) - x' mean(g x')).

    Args:
        layout: of the pyramid's gradient; None: that of pooled features, which is one tensor.
    """
    norms, flat = call.inputs.student_norms, results.grad_features
    if norms is None or flat.numel() == 0:
        return results
    gradients = [flat] if layout is None else maps_of(flat, *layout)
    of_levels = norms.split_with_sizes([2 * feature.shape[1] for feature in call.student_features])
    for feature, gradient, norm in zip(call.student_features, gradients, of_levels):
        scale, mean = norm.view(2, 1, -1, 1, 1)
        standard = (feature - mean) * scale
        slope = (gradient * standard).mean(CHANNEL_AXES, keepdim=True)
        gradient.sub_(gradient.mean(CHANNEL_AXES, keepdim=True)).addcmul_(standard, slope, value=-1).mul_(scale)
    return results


def zeros(device: torch.device, dtype: torch.dtype, counts: list[int]) -> Sequence[Tensor]:
    """1-D tensors of zeros, out of one allocation with one fill."""
    return torch.zeros(sum(counts), dtype=dtype, device=device).split_with_sizes(counts)


def scratch(done: Tensor, partial: Tensor) -> Scratch:
    """``done``: (1,) of zeros; ``partial``: (partials,)."""
    return Scratch(describe(done.view(torch.int32)), describe(partial))


def as_bins(pooled: Tensor) -> Tensor:
    """(R, C, h, w) in which h and w can be walked as one axis."""
    _, _, h, w = pooled.shape
    is_one_axis = h == 1 or w == 1 or pooled.stride(2) == w * pooled.stride(3)
    return pooled if is_one_axis else pooled.contiguous()
