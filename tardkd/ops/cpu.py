"""The registered ops on the CPU: allocate the results, hand everything to the native module.

Small per-region tensors (logits, deltas, boxes) are brought to the kernels' types here; feature maps are read where
they lie, in any dtype, layout and stride. Threads: ``torch.get_num_threads()``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

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
    RegionInputs,
    RegionResults,
    Wants,
)
from .maps import flat_size, layout_of, maps_of
from .memory import empty, empty_like
from .results import distribution_results, new_norms, region_results
from .spec import NORM_EPSILON


class CpuKernels:
    """Implements :class:`tardkd.ops.kernels.Kernels` by the functions of ``module`` (csrc/bindings.cpp)."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def defers(self, call: RegionCall) -> bool:
        """Making the gradient from the inputs again reads the open regions once more.

        It saves the pass that multiplies the gradient by the upstream one. Over whole pyramids that pass takes longer
        than to pool the few regions that gates leave open, but not longer than to pool all. The gradients of heads are
        small, and made of exponentials.
        """
        if call.pooling is None:
            return bool(call.student_features)
        return call.loss.feature_gate != "all"

    def adds(self, call: RegionCall) -> bool:
        """To pool all regions once more takes longer than to add two pyramids."""
        return call.loss.feature_gate != "all"

    def leaves_pixels(self, call: RegionCall) -> bool:
        return False

    def region_distill(self, call: RegionCall, wants: Wants, upstream: Tensor | None) -> RegionResults:
        layout = layout_of(call.student_features if wants.features else [])
        flat = empty((flat_size(layout.sizes),), accumulation_dtype(call.student_features[0].dtype))
        results = region_results(call, wants, flat)
        self._run_regions(call, upstream, results, (flat, layout.channels_last), add=False)
        return results

    def region_distill_backward(self, *packed: Any) -> Tensor:
        raise NotImplementedError("region_distill leaves nothing to do")

    def region_distill_add(
        self, gradients: list[Tensor], call: RegionCall, wants: Wants, upstream: Tensor | None
    ) -> None:
        results = region_results(call, wants, gradients[0].new_empty((0,)))
        self._run_regions(call, upstream, results, gradients, add=True)

    def _run_regions(
        self,
        call: RegionCall,
        upstream: Tensor | None,
        results: RegionResults,
        gradients: list[Tensor] | tuple[Tensor, list[bool]],
        add: bool,
    ) -> None:
        """Write the ``results``, and write the ``gradients`` or ``add`` to them.

        They are L x (N, C_l, H_l, W_l), or flat, with which levels are in channels_last order; see maps.py.
        """
        assert call.pooling is not None, "region_distill pools from pyramids"
        pooling, dtype = call.pooling, accumulation_dtype(call.student_features[0].dtype)
        inputs, upstream = _converted(call.inputs, dtype), _dense_if_given(upstream, dtype)
        self._module.region_distill(
            (call.student_features, pooling.student_scales),
            (call.teacher_features, pooling.teacher_scales),
            gradients,
            add,
            inputs,
            upstream,
            results,
            pooling.align,
            call.loss,
            torch.get_num_threads(),
        )

    def pooled_distill(self, call: RegionCall, wants: Wants, upstream: Tensor | None) -> RegionResults:
        [student], [teacher] = call.student_features, call.teacher_features
        dtype = accumulation_dtype(student.dtype)
        gradient = empty_like(student, dtype) if wants.features else student.new_empty((0,), dtype=dtype)
        results = region_results(call, wants, gradient)
        # One layout on all three sides: the kernel walks a region's elements in memory order.
        is_last = (gradient if wants.features else student).stride(-1) != 1
        memory_format = torch.channels_last if is_last else torch.contiguous_format
        student, teacher = (
            student.contiguous(memory_format=memory_format),
            teacher.contiguous(memory_format=memory_format),
        )
        inputs, upstream = _converted(call.inputs, dtype), _dense_if_given(upstream, dtype)
        self._module.pooled_distill(
            student,
            teacher,
            gradient if wants.features else None,
            inputs,
            upstream,
            results,
            call.loss,
            torch.get_num_threads(),
        )
        return results

    def head_distill(self, call: RegionCall, wants: Wants, upstream: Tensor | None) -> RegionResults:
        dtype = accumulation_dtype(call.inputs.student_logits.dtype)
        results = region_results(call, wants, call.inputs.proposals.new_empty((0,), dtype=dtype))
        inputs, upstream = _converted(call.inputs, dtype), _dense_if_given(upstream, dtype)
        self._module.head_distill(
            inputs,
            upstream,
            results,
            call.loss,
            torch.get_num_threads(),
        )
        return results

    def scale_gradients(
        self, results: list[Tensor], gradients: list[Tensor], factors: Tensor, upstream: list[Tensor], terms: list[int]
    ) -> None:
        for result, gradient, given, term in zip(results, gradients, upstream, terms):
            torch.mul(gradient, given if term < 0 else given * factors[term], out=result)

    def channel_norms(self, features: list[Tensor]) -> Tensor:
        norms = new_norms(features)
        pyramid = (features, [1.0] * len(features))
        self._module.channel_norms(pyramid, NORM_EPSILON, norms, torch.get_num_threads())
        return norms

    def roi_align(self, *packed: Any) -> Tensor:
        call = AlignCall.unpack(packed)
        first, proposals = call.features[0], _dense(call.proposals, torch.float64)
        shape = (proposals.shape[0], first.shape[1], *call.align.output_size)
        pooled = empty(shape, accumulation_dtype(first.dtype))
        self._module.roi_align(
            (call.features, call.scales),
            proposals,
            call.levels,
            pooled,
            call.align,
            torch.get_num_threads(),
        )
        return pooled.to(first.dtype)

    def roi_align_backward(self, *packed: Any) -> Tensor:
        grad_pooled, proposals, levels, layout, scales, align = AlignBackward.unpack(packed)
        dtype = accumulation_dtype(grad_pooled.dtype)
        gradient = empty((flat_size(layout.sizes),), dtype)
        upstream, proposals = _dense(grad_pooled, dtype), _dense(proposals, torch.float64)
        self._module.roi_align_backward(
            (maps_of(gradient, *layout), scales),
            proposals,
            levels,
            upstream,
            align,
            torch.get_num_threads(),
        )
        return gradient.to(grad_pooled.dtype)

    def gaussian_feature_loss(self, *packed: Any) -> tuple[Tensor, Tensor]:
        call = GaussianCall.unpack(packed)
        boxes = _dense(call.gt_boxes, torch.float64)
        loss = boxes.new_empty((), dtype=accumulation_dtype(call.student_features[0].dtype))
        mask_sums = boxes.new_empty((len(call.scales),))
        self._module.gaussian_feature_loss(
            (call.student_features, call.scales),
            (call.teacher_features, call.scales),
            boxes,
            call.sigma_squared,
            loss,
            mask_sums,
            torch.get_num_threads(),
        )
        return loss, mask_sums

    def gaussian_feature_loss_backward(self, *packed: Any) -> list[Tensor]:
        call, mask_sums, upstream = GaussianBackward.unpack(packed)
        boxes = _dense(call.gt_boxes, torch.float64)
        dtype = accumulation_dtype(call.student_features[0].dtype)
        gradients = [empty_like(feature, dtype) for feature in call.student_features]
        self._module.gaussian_feature_loss_backward(
            (call.student_features, call.scales),
            (call.teacher_features, call.scales),
            (gradients, call.scales),
            boxes,
            call.sigma_squared,
            mask_sums,
            upstream.item(),
            torch.get_num_threads(),
        )
        return [gradient.to(feature.dtype) for gradient, feature in zip(gradients, call.student_features)]

    def distribution_distill_loss(self, *packed: Any) -> tuple[Tensor, Tensor]:
        call = DistributionCall(*packed)
        loss, factor = distribution_results(call)
        call = _dense_distributions(call, factor.dtype)
        self._module.distribution_distill_loss(
            *call.tensors(),
            call.temperature,
            call.reduction,
            loss,
            factor,
            torch.get_num_threads(),
        )
        return loss, factor

    def distribution_distill_loss_backward(self, *packed: Any) -> Tensor:
        call, upstream = DistributionBackward.unpack(packed)
        student = call.student_distributions
        gradient = student.new_empty(student.shape, dtype=accumulation_dtype(student.dtype))
        call, upstream = _dense_distributions(call, gradient.dtype), _dense(upstream, gradient.dtype)
        self._module.distribution_distill_loss_backward(
            *call.tensors(),
            call.temperature,
            call.reduction,
            upstream,
            gradient,
            torch.get_num_threads(),
        )
        return gradient.to(student.dtype)


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    converted = tensor.double() if dtype == torch.float64 else tensor.to(dtype)  # double() takes half as long
    return converted.contiguous()


def _dense_if_given(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else _dense(tensor, dtype)


def _converted(inputs: RegionInputs, dtype: torch.dtype) -> RegionInputs:
    """Boxes in float64, what the heads say in the accumulation dtype, all of it contiguous."""
    return RegionInputs(
        proposals=_dense(inputs.proposals, torch.float64),
        student_logits=_dense(inputs.student_logits, dtype),
        teacher_logits=_dense(inputs.teacher_logits, dtype),
        student_deltas=_dense(inputs.student_deltas, dtype),
        teacher_deltas=_dense(inputs.teacher_deltas, dtype),
        labels=_dense(inputs.labels, torch.int64),
        gt_boxes=_dense(inputs.gt_boxes, torch.float64),
        region_weights=_dense_if_given(inputs.region_weights, dtype),
        student_levels=inputs.student_levels,
        teacher_levels=inputs.teacher_levels,
        student_scores=_dense_if_given(inputs.student_scores, dtype),
        teacher_scores=_dense_if_given(inputs.teacher_scores, dtype),
        student_norms=inputs.student_norms,
        teacher_norms=inputs.teacher_norms,
    )


def _dense_distributions(call: DistributionCall, dtype: torch.dtype) -> DistributionCall:
    return call._replace(
        student_distributions=_dense(call.student_distributions, dtype),
        teacher_distributions=_dense(call.teacher_distributions, dtype),
        region_weights=_dense_if_given(call.region_weights, dtype),
    )
