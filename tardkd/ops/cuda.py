"""The registered ops on CUDA devices: allocate results and scratch memory, hand everything to the native module.

Nothing here waits for the device: sizes follow from shapes, and what depends on data is decided by the kernels. They
read every tensor where it lies, in any floating dtype and of any strides; only pooled features whose bins are not one
axis, and the upstream gradient of RoIAlign, are made contiguous first. With
``torch.use_deterministic_algorithms(True)`` feature gradients are gathered in a fixed order; otherwise atomics scatter
them.
"""

from __future__ import annotations

from collections.abc import Callable
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
from .results import distribution_results, gradient_like, new_norms, region_results
from .spec import NORM_EPSILON


class Target(NamedTuple):
    """Where to run."""

    device: int  # index
    stream: int  # a cudaStream_t of that device


class Scratch(NamedTuple):
    """Memory in which the blocks of one launch add up what they found."""

    memory: Tensor  # (begin + 1 + partials,)
    begin: int  # where it begins: with a counter, which is zero


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
        size, grad_pooled, orders = flat_size(layout.sizes), None, layout.channels_last
        if wants.features and torch.are_deterministic_algorithms_enabled():
            grad_pooled = first.new_empty((count, channels, *pooling.align.output_size), dtype=dtype)
            size, orders = 0, []
        scratch = zeros(first.device, dtype, self._module.region_partials(count, channels), size)
        results = region_results(call, wants, scratch.memory[:size])
        self._launch_regions(call, upstream, results, (results.grad_features, orders), grad_pooled, scratch)
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
        scratch = zeros(first.device, accumulation_dtype(first.dtype), partials)
        results = region_results(call, wants, scratch.memory[:0])
        self._launch_regions(call, upstream, results, gradients, None, scratch)

    def _launch_regions(
        self,
        call: RegionCall,
        upstream: Tensor | None,
        results: RegionResults,
        gradients: list[Tensor] | tuple[Tensor, list[bool]],
        grad_pooled: Tensor | None,
        scratch: Scratch,
    ) -> None:
        """Write the ``results``, and add to the ``gradients`` or write ``grad_pooled``, (R, C, p_h, p_w).

        The gradients are L x (N, C_l, H_l, W_l), or flat, with which levels are in channels_last order; see maps.py.
        """
        assert call.pooling is not None, "region_distill pools from pyramids"
        self._module.region_distill(
            (call.student_features, call.pooling.student_scales),
            (call.teacher_features, call.pooling.teacher_scales),
            gradients,
            grad_pooled,
            call.inputs,
            upstream,
            results,
            scratch,
            call.pooling.align,
            call.loss,
            self._target(call.student_features[0].device),
        )

    def pooled_distill(self, call: RegionCall, wants: Wants, upstream: Tensor | None) -> RegionResults:
        [student], [teacher] = call.student_features, call.teacher_features
        dtype = accumulation_dtype(student.dtype)
        gradient = gradient_like(student, dtype) if wants.features else student.new_empty((0,), dtype=dtype)
        scratch = zeros(student.device, dtype, self._module.region_partials(student.shape[0], 1))
        results = region_results(call, wants, gradient)
        student, teacher = as_bins(student), as_bins(teacher)
        self._module.pooled_distill(
            student,
            teacher,
            gradient if wants.features else None,
            call.inputs,
            upstream,
            results,
            scratch,
            call.loss,
            self._target(student.device),
        )
        return through_norms(results, call, None)

    def scale_gradients(
        self, results: list[Tensor], gradients: list[Tensor], factors: Tensor, upstream: list[Tensor], terms: list[int]
    ) -> None:
        if results:
            target = self._target(factors.device)
            self._module.scale_gradients(results, gradients, factors, upstream, terms, target)

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
        scratch = zeros(proposals.device, dtype, self._module.region_partials(proposals.shape[0], 1))
        results = region_results(call, wants, proposals.new_empty((0,), dtype=dtype))
        self._module.head_distill(
            call.inputs,
            upstream,
            results,
            scratch,
            call.loss,
            self._target(proposals.device),
        )
        return results

    def roi_align(self, *packed: Any) -> Tensor:
        call = AlignCall.unpack(packed)
        first, proposals = call.features[0], call.proposals
        pooled = first.new_empty((proposals.shape[0], first.shape[1], *call.align.output_size))
        self._module.roi_align(
            (call.features, call.scales),
            proposals,
            call.levels,
            pooled,
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
            (maps_of(gradient, *backward.layout), backward.scales),
            backward.proposals,
            backward.levels,
            grad_pooled,
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
            (maps_of(gradient, *layout), scales),
            proposals,
            levels,
            gates,
            grad_pooled,
            windows,
            align,
            self._target(proposals.device),
        )
        return gradient

    def gaussian_feature_loss(self, *packed: Any) -> tuple[Tensor, Tensor]:
        call = GaussianCall.unpack(packed)
        boxes, student = call.gt_boxes, (call.student_features, call.scales)
        loss = boxes.new_empty((), dtype=accumulation_dtype(call.student_features[0].dtype))
        mask_sums = boxes.new_empty((len(call.scales),), dtype=torch.float64)
        scratch = zeros(boxes.device, torch.float64, self._module.gaussian_partials(student))
        self._module.gaussian_feature_loss(
            student,
            (call.teacher_features, call.scales),
            boxes,
            call.sigma_squared,
            scratch,
            mask_sums,
            loss,
            self._target(boxes.device),
        )
        return loss, mask_sums

    def gaussian_feature_loss_backward(self, *packed: Any) -> list[Tensor]:
        call, mask_sums, upstream = GaussianBackward.unpack(packed)
        gradients = [gradient_like(feature, feature.dtype) for feature in call.student_features]
        self._module.gaussian_feature_loss_backward(
            (call.student_features, call.scales),
            (call.teacher_features, call.scales),
            (gradients, call.scales),
            call.gt_boxes,
            call.sigma_squared,
            mask_sums,
            upstream,
            self._target(mask_sums.device),
        )
        return gradients

    def distribution_distill_loss(self, *packed: Any) -> tuple[Tensor, Tensor]:
        call = DistributionCall(*packed)
        loss, factor = distribution_results(call)
        scratch = zeros(loss.device, loss.dtype, 4 * call.gates.shape[0])
        self._module.distribution_distill_loss(
            *call.tensors(),
            call.temperature,
            call.reduction,
            scratch,
            loss,
            factor,
            self._target(loss.device),
        )
        return loss, factor

    def distribution_distill_loss_backward(self, *packed: Any) -> Tensor:
        call, upstream = DistributionBackward.unpack(packed)
        student = call.student_distributions
        gradient = student.new_empty(student.shape, dtype=accumulation_dtype(student.dtype))
        self._module.distribution_distill_loss_backward(
            *call.tensors(),
            call.temperature,
            call.reduction,
            upstream,
            gradient,
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


def zeros(device: torch.device, dtype: torch.dtype, partials: int, before: int = 0) -> Scratch:
    """Scratch memory behind as many zeros as are to be ``before`` it, so that one launch fills both."""
    return Scratch(torch.zeros(before + 1 + partials, dtype=dtype, device=device), before)


def as_bins(pooled: Tensor) -> Tensor:
    """(R, C, h, w) in which h and w can be walked as one axis."""
    _, _, h, w = pooled.shape
    is_one_axis = h == 1 or w == 1 or pooled.stride(2) == w * pooled.stride(3)
    return pooled if is_one_axis else pooled.contiguous()
