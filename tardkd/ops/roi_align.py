"""RoIAlign over a feature pyramid: all levels in one launch, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, reference
from .fallback import has_kernels
from .gradients import once_differentiable, wanted
from .maps import layout_of, maps_of


def multiscale_roi_align(
    features: Sequence[Tensor],
    proposals: Tensor | Sequence[Tensor],
    *,
    scales: Sequence[float],
    output_size: int | Sequence[int] = 7,
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_scale: float = 224,
    canonical_level: int = 4,
) -> Tensor:
    """Pool each region from the pyramid level that fits its size, exactly as torchvision's ``MultiScaleRoIAlign``.

    RoIAlign after Mask R-CNN (He et al. 2017), level rule after FPN (Lin et al. 2017, eq. 1). Gradients flow into the
    features.

    Args:
        features: L tensors (N, C, H_l, W_l), finest first; float16, bfloat16, float32 or float64, any strides.
        proposals: (R, 5) image index and xyxy, or N tensors (R_n, 4) xyxy; input pixels, float32 (or float64).
        scales: map pixels per input pixel, one a level.
        output_size: bins a side, an int or (height, width).
        sampling_ratio: samples a bin and axis; 0: adaptive, ``ceil(region / bins)``.
        aligned: shift regions by half a pixel, as in torchvision's ``roi_align``.
        canonical_scale, canonical_level: a region of ``canonical_scale`` pixels a side belongs to ``canonical_level``.

    Returns:
        (R, C, p_h, p_w) in the features' dtype, in the order of the proposals; accumulated in float32 (float64 for
        float64). A region with a non-finite box or an image index out of range is zero (``TARDKD_CHECK=1``: raises).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    checks.check_pyramid("features", features)
    checks.check_scales("scales", scales, "features", features)
    checks.check_level_rule(canonical_scale, canonical_level)
    if not has_kernels(features[0].device):
        return reference.multiscale_roi_align(
            features,
            proposals,
            scales=scales,
            output_size=output_size,
            sampling_ratio=sampling_ratio,
            aligned=aligned,
            canonical_scale=canonical_scale,
            canonical_level=canonical_level,
        )
    num_images = features[0].shape[0]
    regions = checks.as_regions(proposals, num_images, features[0].device)
    if checks.checking_values():
        checks.check_region_values(regions, num_images)
    scales = list(map(float, scales))
    align = (sampling_ratio, aligned, float(canonical_scale), canonical_level)
    output_size = list(checks.output_pair(output_size))
    if wanted(*features):
        return _RoIAlign.apply(regions, scales, output_size, align, *features)
    return torch.ops.tardkd.roi_align(list(features), regions, scales, output_size, *align)


def shared_roi_align(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    proposals: Tensor | Sequence[Tensor],
    *,
    student_scales: Sequence[float],
    teacher_scales: Sequence[float] | None = None,
    output_size: int | Sequence[int] = 7,
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_scale: float = 224,
    canonical_level: int = 4,
) -> tuple[Tensor, Tensor]:
    """The same regions pooled from both models' pyramids, each with its own scales and level rule.

    Arguments as in :func:`multiscale_roi_align` and :func:`region_distill_loss`; both pyramids have N images and C
    channels. Gradients flow into the student's features only; the teacher's must not require grad.

    Returns:
        ``(student_pooled, teacher_pooled)``, each (R, C, p_h, p_w).
    """
    teacher_scales = checks.check_pyramids(student_features, teacher_features, student_scales, teacher_scales)
    num_images, device = student_features[0].shape[0], student_features[0].device
    regions = checks.as_regions(proposals, num_images, device)
    student, teacher = (
        multiscale_roi_align(
            features,
            regions,
            scales=scales,
            output_size=output_size,
            sampling_ratio=sampling_ratio,
            aligned=aligned,
            canonical_scale=canonical_scale,
            canonical_level=canonical_level,
        )
        for features, scales in ((student_features, student_scales), (teacher_features, teacher_scales))
    )
    return student, teacher


class _RoIAlign(torch.autograd.Function):
    """Keeps only the regions: the gradient does not depend on the features."""

    @staticmethod
    def forward(ctx, regions, scales, output_size, align, *features):
        ctx.save_for_backward(regions)
        ctx.scales, ctx.align, ctx.layout = scales, align, layout_of(features)
        return torch.ops.tardkd.roi_align(list(features), regions, scales, output_size, *align)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_pooled):
        (regions,) = ctx.saved_tensors
        gradient = torch.ops.tardkd.roi_align_backward(grad_pooled, regions, *ctx.layout, ctx.scales, *ctx.align)
        return None, None, None, None, *maps_of(gradient, *ctx.layout)
