"""CPU implementations of the registered ops: allocate the results, hand pointers to the native module.

Small per-region tensors (logits, deltas, boxes) are brought to the kernels' types here; feature maps are read where
they lie, in any dtype, layout and stride. Threads: ``torch.get_num_threads()``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import CHOICES, accumulation_dtype
from .extension import native_module as _native
from .maps import flat_size, is_channels_last, layout_of, maps_of
from .memory import empty, empty_like

cuda_module = getattr(_native, "cuda", None)  # None: built without CUDA kernels

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
DTYPE_CODES |= {torch.int32: -1, torch.int64: -1, torch.bool: -1}  # only ever one of them in its place
NONE = 2  # index of "none" among the reductions
GATES = 3  # index among the results of the region losses

FEATURE_GATE, ALL = list(CHOICES).index("feature_gate"), CHOICES["feature_gate"].index("all")


def describe(tensor: Tensor | None) -> tuple | None:
    """What the native module needs to know of a tensor."""
    if tensor is None:
        return None
    return tensor.data_ptr(), DTYPE_CODES[tensor.dtype], tuple(tensor.shape), tensor.stride()


def describe_all(tensors: Sequence[Tensor]) -> list[tuple]:
    return [describe(tensor) for tensor in tensors]


def gradient_like(feature: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised, dense, in the feature's memory format."""
    memory_format = torch.channels_last if is_channels_last(feature) else torch.contiguous_format
    return torch.empty_like(feature, dtype=dtype, memory_format=memory_format)


def region_results(
    regions: Tensor,
    student_logits: Tensor,
    student_deltas: Tensor,
    dtype: torch.dtype,
    reduce: bool,
    wants: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Uninitialised (feature, classification, regression, gates, scores, factors, grad_logits, grad_deltas)."""
    count = regions.shape[0]
    losses = [regions.new_empty(() if reduce else (count,), dtype=dtype) for _ in range(3)]
    gates = regions.new_empty((count, 3), dtype=torch.bool)
    scores = regions.new_empty((count, 4), dtype=dtype)
    factors = regions.new_empty((3,), dtype=dtype)
    gradients = [
        regions.new_empty(head.shape if want else (0,), dtype=dtype)
        for head, want in zip((student_logits, student_deltas), wants[1:])
    ]
    return *losses, gates, scores, factors, *gradients


def defers(op: str, choices: Sequence[int]) -> bool:
    """Whether the gradients of a reduced loss are better made in the backward pass, from the inputs.

    It costs reading the open regions once more, and saves the pass that multiplies the gradient by the upstream one:
    over whole pyramids, which takes longer than to pool the few regions that gates leave open, but not than to pool
    all.
    """
    return op == "pooled_distill" or choices[FEATURE_GATE] != ALL


class _RegionTensors:
    """Keeps the converted per-region tensors alive while the native module holds their pointers."""

    def __init__(self, per_region: Sequence[Tensor | None], upstream: Tensor | None, dtype: torch.dtype) -> None:
        regions, *heads, labels, gt_boxes, weights = per_region
        self.tensors = [
            regions.double().contiguous(),
            *(head.to(dtype).contiguous() for head in heads),
            labels.contiguous(),
            gt_boxes.double().contiguous(),
            None if weights is None else weights.to(dtype).contiguous(),
            None if upstream is None else upstream.to(dtype).contiguous(),
        ]

    def describe(self) -> tuple:
        return tuple(map(describe, self.tensors))


def describe_results(results: Sequence[Tensor], wants: Sequence[bool]) -> tuple:
    unwanted = (False,) * 6 + tuple(not want for want in wants[1:])
    return tuple(None if skip else describe(result) for result, skip in zip(results, unwanted))


def region_distill(
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
    dtype = accumulation_dtype(student_features[0].dtype)
    heads = (student_logits, teacher_logits, student_deltas, teacher_deltas)
    inputs = _RegionTensors((regions, *heads, labels, gt_boxes, region_weights), upstream, dtype)
    results = region_results(regions, student_logits, student_deltas, dtype, choices[-1] != NONE, wants)
    layout = layout_of(student_features if wants[0] else [])
    gradient = empty((flat_size(layout.sizes),), dtype)
    _native.region_distill(
        describe_all(student_features),
        describe_all(teacher_features),
        describe_all(maps_of(gradient, *layout)),
        student_scales,
        teacher_scales,
        inputs.describe(),
        describe_results(results, wants),
        (*output_size, sampling_ratio, aligned, canonical_scale, canonical_level),
        (choices, temperature, beta, box_weights),
        torch.get_num_threads(),
    )
    return *results, gradient


def pooled_layout(pooled: Tensor, last: bool) -> Tensor:
    """Dense NCHW, or dense channels_last."""
    return pooled.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def pooled_distill(
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
    inputs = _RegionTensors((regions, *heads, labels, gt_boxes, region_weights), upstream, dtype)
    results = region_results(regions, student_logits, student_deltas, dtype, choices[-1] != NONE, wants)
    gradient = empty_like(student_pooled, dtype) if wants[0] else student_pooled.new_empty((0,), dtype=dtype)
    # One layout on all three sides: the kernel walks a region's elements in memory order.
    last = (gradient if wants[0] else student_pooled).stride(-1) != 1
    student_pooled, teacher_pooled = pooled_layout(student_pooled, last), pooled_layout(teacher_pooled, last)
    _native.pooled_distill(
        describe(student_pooled),
        describe(teacher_pooled),
        describe(gradient) if wants[0] else None,
        inputs.describe(),
        describe_results(results, wants),
        (choices, temperature, beta, box_weights),
        torch.get_num_threads(),
    )
    return *results, gradient


def roi_align(
    features: list[Tensor],
    regions: Tensor,
    scales: list[float],
    output_size: list[int],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: int,
) -> Tensor:
    first = features[0]
    pooled = empty((regions.shape[0], first.shape[1], *output_size), accumulation_dtype(first.dtype))
    boxes = regions.double().contiguous()
    align = (*output_size, sampling_ratio, aligned, canonical_scale, canonical_level)
    _native.roi_align(
        describe_all(features), scales, describe(boxes), describe(pooled), align, False, torch.get_num_threads()
    )
    return pooled.to(first.dtype)


def roi_align_backward(
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
    dtype = accumulation_dtype(grad_pooled.dtype)
    gradient = empty((flat_size(sizes),), dtype)
    maps = maps_of(gradient, sizes, channels_last)
    boxes, upstream = regions.double().contiguous(), grad_pooled.to(dtype).contiguous()
    align = (*grad_pooled.shape[2:], sampling_ratio, aligned, canonical_scale, canonical_level)
    _native.roi_align(
        describe_all(maps), scales, describe(boxes), describe(upstream), align, True, torch.get_num_threads()
    )
    return gradient.to(grad_pooled.dtype)


def gaussian_feature_loss(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    boxes: Tensor,
    scales: list[float],
    sigma_squared: float,
) -> tuple[Tensor, Tensor]:
    loss = boxes.new_empty((), dtype=accumulation_dtype(student_features[0].dtype))
    mask_sums = boxes.new_empty((len(scales),), dtype=torch.float64)
    boxes = boxes.double().contiguous()
    _native.gaussian_feature_loss(
        describe_all(student_features),
        describe_all(teacher_features),
        scales,
        describe(boxes),
        sigma_squared,
        describe(loss),
        describe(mask_sums),
        torch.get_num_threads(),
    )
    return loss, mask_sums


def gaussian_feature_loss_backward(
    student_features: list[Tensor],
    teacher_features: list[Tensor],
    boxes: Tensor,
    scales: list[float],
    sigma_squared: float,
    mask_sums: Tensor,
    upstream: Tensor,
) -> list[Tensor]:
    dtype = accumulation_dtype(student_features[0].dtype)
    gradients = [empty_like(feature, dtype) for feature in student_features]
    boxes = boxes.double().contiguous()
    _native.gaussian_feature_loss_backward(
        describe_all(student_features),
        describe_all(teacher_features),
        describe_all(gradients),
        scales,
        describe(boxes),
        sigma_squared,
        describe(mask_sums),
        upstream.item(),
        torch.get_num_threads(),
    )
    return [gradient.to(feature.dtype) for gradient, feature in zip(gradients, student_features)]
