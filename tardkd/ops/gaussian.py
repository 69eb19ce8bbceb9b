"""What the Gaussian-mask loss is called with: its signature, checked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import checks
from .inputs import GaussianCall


def gaussian_feature_loss(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    gt_boxes: Sequence[Tensor],
    *,
    scales: Sequence[float],
    sigma_squared: float = 2.0,
) -> GaussianCall:
    """Squared distance of two pyramids, weighted by a Gaussian at every ground-truth box.

    The backbone level of arXiv 2006.13108, the formula by readers' accounts, its constants our choice. On a level's
    map, for a box with centre (x0, y0), width w and height h in map pixels,
    ``M(x, y) = exp(-(x - x0)^2 / (sigma^2 (w/2)^2) - (y - y0)^2 / (sigma^2 (h/2)^2))`` at the integer pixels (x, y)
    inside the box, 0 outside, the maximum where boxes overlap. A level's loss is
    ``sum M |F_S - F_T|^2 / (2 N_a)``, summed over the batch and the channels, ``N_a = max(1, sum M)``; the result is
    the mean over levels.

    Args:
        student_features, teacher_features: L tensors (N, C_l, H_l, W_l), level by level of one shape; float16,
            bfloat16, float32 or float64, any strides.
        gt_boxes: N tensors (G_n, 4) xyxy, input pixels; boxes without area or not finite are left out.
        scales: map pixels per input pixel, one a level.
        sigma_squared: sigma^2.

    Returns:
        A scalar of the accumulation dtype; gradients flow into the student's features only.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, or teacher features that require grad.
    """
    checks.check_same_pyramids(student_features, teacher_features, scales)
    checks.check_gaussian(gt_boxes, student_features[0], sigma_squared)
    if checks.checking_values():
        checks.check_box_values("gt_boxes", gt_boxes)
    num_images, device = student_features[0].shape[0], student_features[0].device
    boxes = checks.as_regions(gt_boxes, num_images, device)
    return GaussianCall(
        list(student_features), list(teacher_features), boxes, list(map(float, scales)), float(sigma_squared)
    )
