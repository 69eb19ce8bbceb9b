"""What the loss of the distributions of boxes' sides is called with: its signature, checked."""

from __future__ import annotations

from torch import Tensor

from . import checks
from .inputs import DistributionCall
from .spec import LossSpec, Reduction


def distribution_distill_loss(
    student_distributions: Tensor,
    teacher_distributions: Tensor,
    gates: Tensor,
    *,
    temperature: float = 1.0,
    region_weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> DistributionCall:
    """Divergence of the distributions that two heads have for the four sides of a box.

    Heads with a distribution focal loss (Generalized Focal Loss, Li et al. 2020; YOLOv8 to 11 have them) say for every
    side how likely each distance from the region's reference point is. What they say can be compared where both models
    have the same points and bins. With m_i the gates and w_i the weights of the regions, the loss is
    ``sum_i w_i m_i l_i / max(1, sum_i m_i)``, ``l_i`` the mean over the four sides of
    ``T^2 KL(softmax(z_T / T) || softmax(z_S / T))``: localization distillation (Zheng et al. 2022) of the regions that
    the gates leave open.

    Args:
        student_distributions, teacher_distributions: (R, 4, bins) logits, of one shape; float16, bfloat16, float32 or
            float64, any strides.
        gates: (R,) bool, which of the regions to distil: as a rule ``gates[:, 2]`` of the :class:`RegionLosses` of the
            same regions, open where the teacher's box is the better one.
        temperature: T. With CUDA kernels in float32 the absolute error is about ``1e-7 T^2``.
        region_weights: (R,) w_i; multiplies the numerator, not the count. None: ones.
        reduction: "mean" as above, "sum" without the division, "none": (R,).

    Returns:
        A scalar, or (R,) with ``reduction="none"``, of the accumulation dtype (float64 for float64, else float32);
        gradients flow into the student's distributions only. A closed region is not looked at.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, an unknown option, or a teacher tensor that
            requires grad.
    """
    loss = LossSpec(temperature=temperature, reduction=reduction).checked()
    checks.check_distributions(student_distributions, teacher_distributions, gates, region_weights)
    return DistributionCall(
        student_distributions, teacher_distributions, gates, region_weights, loss.temperature, loss.reduction
    )
