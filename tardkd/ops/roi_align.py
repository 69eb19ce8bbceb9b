"""What RoIAlign over feature pyramids is called with: the signatures, checked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import checks
from .inputs import AlignCall
from .spec import RoIAlignSpec


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
    levels: Tensor | None = None,
) -> AlignCall:
    """Pool each region from the pyramid level that fits its size, exactly as torchvision's ``MultiScaleRoIAlign``.

    RoIAlign after Mask R-CNN (He et al. 2017), level rule after FPN (Lin et al. 2017, eq. 1). Gradients flow into the
    features.

    Args:
        features: L tensors (N, C, H_l, W_l), at most 8, finest first; float16, bfloat16, float32 or float64, any
            strides.
        proposals: (R, 5) image index and xyxy, or N tensors (R_n, 4) xyxy; input pixels, float32 (or float64).
        scales: map pixels per input pixel, one a level.
        output_size: bins a side, an int or (height, width).
        sampling_ratio: samples a bin and axis; 0 or less: adaptive, ``ceil(region / bins)``.
        aligned: shift regions by half a pixel, as in torchvision's ``roi_align``.
        canonical_scale, canonical_level: a region of ``canonical_scale`` pixels a side belongs to ``canonical_level``.
        levels: (R,) int64 or int32, the level of each region in ``features`` where no rule is to choose it, as for the
            cells of a dense head, which know theirs. None: by the rule.

    Returns:
        (R, C, p_h, p_w) in the features' dtype, in the order of the proposals; accumulated in float32 (float64 for
        float64). A region with a non-finite box, an image index or a level out of range is zero (``TARDKD_CHECK=1``:
        raises).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    checks.check_pyramid("features", features)
    checks.check_scales("scales", scales, "features", features)
    align = RoIAlignSpec.checked(output_size, sampling_ratio, aligned, canonical_scale, canonical_level)
    regions = _checked_regions(proposals, features)
    levels = _checked_levels("levels", levels, regions, features)
    return AlignCall(list(features), regions, levels, list(map(float, scales)), align)


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
    student_levels: Tensor | None = None,
    teacher_levels: Tensor | None = None,
) -> tuple[AlignCall, AlignCall]:
    """The same regions pooled from both models' pyramids, each with its own scales and level rule.

    Arguments as in :func:`multiscale_roi_align` and :func:`region_distill_loss`; both pyramids have N images and C
    channels. Gradients flow into the student's features only; the teacher's must not require grad.

    Returns:
        ``(student_pooled, teacher_pooled)``, each (R, C, p_h, p_w).
    """
    checks.check_pyramids(student_features, teacher_features)
    scales = checks.checked_scales(student_features, teacher_features, student_scales, teacher_scales)
    align = RoIAlignSpec.checked(output_size, sampling_ratio, aligned, canonical_scale, canonical_level)
    regions = _checked_regions(proposals, student_features)
    student_levels = _checked_levels("student_levels", student_levels, regions, student_features)
    teacher_levels = _checked_levels("teacher_levels", teacher_levels, regions, teacher_features)
    return (
        AlignCall(list(student_features), regions, student_levels, scales[0], align),
        AlignCall(list(teacher_features), regions, teacher_levels, scales[1], align),
    )


def _checked_regions(proposals: Tensor | Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
    """(R, 5) regions of the images that ``features``, L x (N, C, H_l, W_l), were made of."""
    num_images = features[0].shape[0]
    regions = checks.as_regions(proposals, num_images, features[0].device)
    if checks.checking_values():
        checks.check_region_values(checks.region_faults(regions, num_images))
    return regions


def _checked_levels(name: str, levels: Tensor | None, regions: Tensor, features: Sequence[Tensor]) -> Tensor | None:
    """(R,) int64 levels of the ``regions`` (R, 5) in the pyramid of ``features``, L x (N, C, H_l, W_l)."""
    levels = checks.checked_levels(name, levels, regions)
    if levels is not None and checks.checking_values():
        checks.check_region_values(checks.level_faults(name, levels, len(features)))
    return levels
