"""CUDA implementations of the registered ops.

They allocate results and scratch memory, and hand pointers and the stream to the native module. Nothing here waits for
the device: sizes follow from shapes, and what depends on data is decided by the kernels. They read every tensor where
it lies, in any floating dtype and of any strides. With ``torch.use_deterministic_algorithms(True)`` feature gradients
are gathered in a fixed order; otherwise atomics scatter them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .checks import accumulation_dtype
from .maps import Layout, flat_size, layout_of, maps_of
from .native import GATES, NONE, describe, describe_all, describe_results, gradient_like, region_results


class CudaKernels:
    """The ops by the functions of ``module`` (csrc/cuda_bindings.cpp), on the stream that ``stream_of`` names."""

    def __init__(self, module: ModuleType, stream_of: Callable[[torch.device], int]) -> None:
        self._module = module
        self._stream_of = stream_of

    def defers(self, op: str, choices: Sequence[int]) -> bool:
        """Pooled regions are read once more in the backward pass: no more bytes, and no gradient to keep until then."""
        return op == "pooled_distill"

    def _target(self, device: torch.device) -> tuple[int, int]:
        return device.index or 0, self._stream_of(device)

    def region_distill(
        self,
        student_features: list[Tensor],
        teacher_features: list[Tensor],
        regions: Tensor,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_deltas: Tensor,
        teacher_deltas: Tensor,
        labels: Tensor,
        gt_boxes: Tensor,
        region_weights: Tensor | None,
        upstream: Tensor | None,
        student_scales: list[float],
        teacher_scales: list[float],
        output_size: list[int],
        sampling_ratio: int,
        aligned: bool,
        canonical_scale: float,
        canonical_level: int,
        choices: list[int],
        temperature: float,
        beta: float,
        box_weights: list[float],
        wants: list[bool],
    ) -> tuple[Tensor, ...]:
        first = student_features[0]
        count, channels = regions.shape[0], first.shape[1]
        dtype = accumulation_dtype(first.dtype)
        heads = (student_logits, teacher_logits, student_deltas, teacher_deltas)
        tables = (regions, *heads, labels, gt_boxes, region_weights, upstream)
        results = region_results(regions, student_logits, student_deltas, dtype, choices[-1] != NONE, wants)
        align = (*output_size, sampling_ratio, aligned, canonical_scale, canonical_level)

        layout = layout_of(student_features if wants[0] else [])
        size = flat_size(layout.sizes)
        gather = wants[0] and torch.are_deterministic_algorithms_enabled()
        grad_pooled = first.new_empty((count, channels, *output_size), dtype=dtype) if gather else None
        counts = [0 if gather else size, self._module.region_partials(count, channels), 1]
        gradient, partial, done = zeros(first.device, dtype, counts)
        self._module.region_distill(
            describe_all(student_features),
            describe_all(teacher_features),
            [] if gather else describe_all(maps_of(gradient, *layout)),
            describe(grad_pooled),
            student_scales,
            teacher_scales,
            tuple(map(describe, tables)),
            describe_results(results, wants),
            describe_scratch(done, partial),
            align,
            (choices, temperature, beta, box_weights),
            self._target(first.device),
        )
        if gather:
            gradient = torch.empty((size,), dtype=dtype, device=first.device)
            self._gather(gradient, layout, student_scales, regions, results[GATES], grad_pooled, align)
        return *results, gradient

    def pooled_distill(
        self,
        student_pooled: Tensor,
        teacher_pooled: Tensor,
        regions: Tensor,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_deltas: Tensor,
        teacher_deltas: Tensor,
        labels: Tensor,
        gt_boxes: Tensor,
        region_weights: Tensor | None,
        upstream: Tensor | None,
        choices: list[int],
        temperature: float,
        beta: float,
        box_weights: list[float],
        wants: list[bool],
    ) -> tuple[Tensor, ...]:
        dtype = accumulation_dtype(student_pooled.dtype)
        heads = (student_logits, teacher_logits, student_deltas, teacher_deltas)
        tables = (regions, *heads, labels, gt_boxes, region_weights, upstream)
        results = region_results(regions, student_logits, student_deltas, dtype, choices[-1] != NONE, wants)
        gradient = gradient_like(student_pooled, dtype) if wants[0] else student_pooled.new_empty((0,), dtype=dtype)
        partial, done = zeros(regions.device, dtype, [self._module.region_partials(regions.shape[0], 1), 1])
        student_pooled, teacher_pooled = as_bins(student_pooled), as_bins(teacher_pooled)
        self._module.pooled_distill(
            describe(student_pooled),
            describe(teacher_pooled),
            describe(gradient) if wants[0] else None,
            tuple(map(describe, tables)),
            describe_results(results, wants),
            describe_scratch(done, partial),
            (choices, temperature, beta, box_weights),
            self._target(student_pooled.device),
        )
        return *results, gradient

    def roi_align(
        self,
        features: list[Tensor],
        regions: Tensor,
        scales: list[float],
        output_size: list[int],
        sampling_ratio: int,
        aligned: bool,
        canonical_scale: float,
        canonical_level: int,
    ) -> Tensor:
        pooled = features[0].new_empty((regions.shape[0], features[0].shape[1], *output_size))
        align = (*output_size, sampling_ratio, aligned, canonical_scale, canonical_level)
        self._module.roi_align(
            describe_all(features), scales, describe(regions), describe(pooled), align, self._target(pooled.device)
        )
        return pooled

    def roi_align_backward(
        self,
        grad_pooled: Tensor,
        regions: Tensor,
        sizes: list[int],
        channels_last: list[bool],
        scales: list[float],
        sampling_ratio: int,
        aligned: bool,
        canonical_scale: float,
        canonical_level: int,
    ) -> Tensor:
        grad_pooled, layout, size = grad_pooled.contiguous(), Layout(sizes, channels_last), flat_size(sizes)
        align = (*grad_pooled.shape[2:], sampling_ratio, aligned, canonical_scale, canonical_level)
        if torch.are_deterministic_algorithms_enabled():
            gradient = grad_pooled.new_empty((size,))
            self._gather(gradient, layout, scales, regions, None, grad_pooled, align)
            return gradient
        gradient = grad_pooled.new_zeros((size,), dtype=accumulation_dtype(grad_pooled.dtype))
        self._module.roi_align_scatter(
            describe_all(maps_of(gradient, *layout)),
            scales,
            describe(regions),
            describe(grad_pooled),
            align,
            self._target(grad_pooled.device),
        )
        return gradient.to(grad_pooled.dtype)

    def _gather(
        self,
        gradient: Tensor,
        layout: Layout,
        scales: list[float],
        regions: Tensor,
        gates: Tensor | None,
        grad_pooled: Tensor,
        align: tuple,
    ) -> None:
        """Write the maps' gradient from that of the pooled features, of all regions or of those with an open gate."""
        windows = regions.new_empty((6 * regions.shape[0],), dtype=torch.int32)
        self._module.roi_align_gather(
            describe_all(maps_of(gradient, *layout)),
            scales,
            describe(regions),
            describe(gates),
            describe(grad_pooled),
            describe(windows),
            align,
            self._target(regions.device),
        )

    def gaussian_feature_loss(
        self,
        student_features: list[Tensor],
        teacher_features: list[Tensor],
        boxes: Tensor,
        scales: list[float],
        sigma_squared: float,
    ) -> tuple[Tensor, Tensor]:
        student = describe_all(student_features)
        loss = boxes.new_empty((), dtype=accumulation_dtype(student_features[0].dtype))
        mask_sums = boxes.new_empty((len(scales),), dtype=torch.float64)
        partial, done = zeros(boxes.device, torch.float64, [self._module.gaussian_partials(student, scales), 1])
        self._module.gaussian_feature_loss(
            student,
            describe_all(teacher_features),
            scales,
            describe(boxes),
            sigma_squared,
            describe_scratch(done, partial),
            describe(mask_sums),
            describe(loss),
            self._target(boxes.device),
        )
        return loss, mask_sums

    def gaussian_feature_loss_backward(
        self,
        student_features: list[Tensor],
        teacher_features: list[Tensor],
        boxes: Tensor,
        scales: list[float],
        sigma_squared: float,
        mask_sums: Tensor,
        upstream: Tensor,
    ) -> list[Tensor]:
        gradients = [gradient_like(feature, feature.dtype) for feature in student_features]
        self._module.gaussian_feature_loss_backward(
            describe_all(student_features),
            describe_all(teacher_features),
            describe_all(gradients),
            scales,
            describe(boxes),
            sigma_squared,
            describe(mask_sums),
            describe(upstream),
            self._target(boxes.device),
        )
        return gradients


def zeros(device: torch.device, dtype: torch.dtype, counts: list[int]) -> Sequence[Tensor]:
    """1-D tensors of zeros, out of one allocation with one fill."""
    return torch.zeros(sum(counts), dtype=dtype, device=device).split(counts)


def describe_scratch(done: Tensor, partial: Tensor) -> tuple[tuple, tuple]:
    return describe(done.view(torch.int32)), describe(partial)


def as_bins(pooled: Tensor) -> Tensor:
    """(R, C, h, w) in which h and w can be walked as one axis."""
    _, _, h, w = pooled.shape
    one_axis = h == 1 or w == 1 or pooled.stride(2) == w * pooled.stride(3)
    return pooled if one_axis else pooled.contiguous()
