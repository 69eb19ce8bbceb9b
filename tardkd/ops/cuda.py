"""The registered ops on CUDA devices: allocate results and scratch memory, hand everything to the native module.

Nothing here waits for the device: sizes follow from shapes, and what depends on data is decided by the kernels. They
read every tensor where it lies, in any floating dtype and of any strides; only pooled features whose bins are not one
axis, and the upstream gradient of RoIAlign, are made contiguous first. Everything is added up in a fixed order, so that
results are the same bits again, whatever ``torch.use_deterministic_algorithms`` says.
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
    RegionBackward,
    RegionCall,
    RegionResults,
    Wants,
)
from .maps import Layout, flat_size, layout_of, maps_of
from .results import distribution_results, gradient_like, new_norms, packed_pooled, region_results
from .spec import NORM_EPSILON, RoIAlignSpec


class Target(NamedTuple):
    """Where to run."""

    device: int  # index
    stream: int  # a cudaStream_t of that device


class Scratch(NamedTuple):
    """Memory in which the blocks of one launch add up what they found."""

    memory: Tensor  # (1 + partials,), which begins with a counter


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

    def leaves_pixels(self, call: RegionCall) -> bool:
        """So that the backward pass writes it once, multiplied by the upstream gradient and rounded.

        Not where it has to go through the statistics of maps.
        """
        return call.pooling is not None and call.loss.feature_norm == "none"

    def region_distill(self, call: RegionCall, wants: Wants, upstream: Tensor | None) -> RegionResults:
        assert call.pooling is not None, "region_distill pools from pyramids"
        first, count = call.student_features[0], call.inputs.proposals.shape[0]
        dtype, channels = accumulation_dtype(first.dtype), max(feature.shape[1] for feature in call.student_features)
        pooled = first.new_empty((0,), dtype=dtype)
        if wants.features:
            pooled = packed_pooled(call.student_features, count, call.pooling.align.output_size, dtype)
        scratch = new_scratch(first.device, dtype, self._module.region_partials(count, channels))
        results = region_results(call, wants, pooled)
        self._module.region_distill(
            (call.student_features, call.pooling.student_scales),
            (call.teacher_features, call.pooling.teacher_scales),
            call.inputs,
            upstream,
            results,
            scratch,
            call.pooling.align,
            call.loss,
            self._target(first.device),
        )
        if call.inputs.student_norms is None or not wants.features:
            return results
        layout = layout_of(call.student_features)
        backward = RegionBackward.of(call, pooled, results.gates, None)
        return through_norms(results._replace(grad_features=self._to_pixels(backward, layout, dtype)), call, layout)

    def region_distill_backward(self, *packed: Any) -> Tensor:
        backward = RegionBackward.unpack(packed)
        features = backward.student_features
        return self._to_pixels(backward, layout_of(features), features[0].dtype)

    def region_distill_add(
        self, gradients: list[Tensor], call: RegionCall, wants: Wants, upstream: Tensor | None
    ) -> None:
        results = self.region_distill(call, wants, upstream)
        backward = RegionBackward.of(call, results.grad_features, results.gates, None)
        self._gather_regions(backward, gradients, add=True)

    def _to_pixels(self, backward: RegionBackward, layout: Layout, dtype: torch.dtype) -> Tensor:
        """The maps' gradient, flat, in ``dtype``."""
        gradient = backward.grad_pooled.new_empty((flat_size(layout.sizes),), dtype=dtype)
        self._gather_regions(backward, maps_of(gradient, *layout), add=False)
        return gradient

    def _gather_regions(self, backward: RegionBackward, gradients: list[Tensor], *, add: bool) -> None:
        """Write the gradients of maps, L x (N, C_l, H_l, W_l), or ``add`` to them."""
        pooled, gates, factor, _, proposals, levels, scales, align = backward
        self._gather(gradients, scales, proposals, levels, align, packed=pooled, gates=gates, factor=factor, add=add)

    def pooled_distill(self, call: RegionCall, wants: Wants, upstream: Tensor | None) -> RegionResults:
        [student], [teacher] = call.student_features, call.teacher_features
        dtype = accumulation_dtype(student.dtype)
        gradient = gradient_like(student, dtype) if wants.features else student.new_empty((0,), dtype=dtype)
        scratch = new_scratch(student.device, dtype, self._module.region_partials(student.shape[0], 1))
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
        scratch = new_scratch(proposals.device, dtype, self._module.region_partials(proposals.shape[0], 1))
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
        grad_pooled, proposals, levels, layout, scales, align = AlignBackward.unpack(packed)
        gradient = grad_pooled.new_empty((flat_size(layout.sizes),))
        bins, dtype = align.output_size, accumulation_dtype(grad_pooled.dtype)
        pooled = packed_pooled([grad_pooled], proposals.shape[0], bins, dtype)
        maps, loose = maps_of(gradient, *layout), grad_pooled.contiguous()
        self._gather(maps, scales, proposals, levels, align, packed=pooled, loose=loose)
        return gradient

    def _gather(
        self,
        gradients: list[Tensor],
        scales: list[float],
        proposals: Tensor,
        levels: Tensor | None,
        align: RoIAlignSpec,
        *,
        packed: Tensor,
        loose: Tensor | None = None,
        gates: Tensor | None = None,
        factor: Tensor | None = None,
        add: bool = False,
    ) -> None:
        """RoIAlign's gradient, from bins to the pixels of maps.

        Args:
            gradients: L x (N, C_l, H_l, W_l), which are written, or added to with ``add``.
            proposals: (R, 5).
            levels: (R,); None: by the level rule.
            packed: the bins' gradient, see :func:`packed_pooled`.
            loose: (R, C, p_h, p_w), contiguous, of which ``packed`` is made first; None: it is made.
            gates: (R, 3) bool, regions with a closed first gate are left out; None: none are.
            factor: () that the gradient is multiplied by; None: 1.
        """
        maps = (gradients, scales)
        size = self._module.gather_plan(maps, proposals.shape[0], align)
        plan = packed.new_empty((size,))
        tensors = (proposals, levels, gates, packed, loose, factor, plan)
        self._module.roi_align_gather(maps, add, *tensors, align, self._target(proposals.device))

    def gaussian_feature_loss(self, *packed: Any) -> tuple[Tensor, Tensor]:
        call = GaussianCall.unpack(packed)
        boxes, student = call.gt_boxes, (call.student_features, call.scales)
        loss = boxes.new_empty((), dtype=accumulation_dtype(call.student_features[0].dtype))
        mask_sums = boxes.new_empty((len(call.scales),), dtype=torch.float64)
        scratch = new_scratch(boxes.device, torch.float64, self._module.gaussian_partials(student))
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
        scratch = new_scratch(loss.device, loss.dtype, 4 * call.gates.shape[0])
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


def new_scratch(device: torch.device, dtype: torch.dtype, partials: int) -> Scratch:
    """All zeros."""
    return Scratch(torch.zeros(1 + partials, dtype=dtype, device=device))


def as_bins(pooled: Tensor) -> Tensor:
    """(R, C, h, w) in which h and w can be walked as one axis."""
    _, _, h, w = pooled.shape
    is_one_axis = h == 1 or w == 1 or pooled.stride(2) == w * pooled.stride(3)
    return pooled if is_one_axis else pooled.contiguous()
