"""Gaussian-mask loss over whole feature maps; the mask is never materialised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, reference
from .fallback import has_kernels
from .gradients import once_differentiable


def gaussian_feature_loss(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    gt_boxes: Sequence[Tensor],
    *,
    scales: Sequence[float],
    sigma_squared: float = 2.0,
) -> Tensor:
    """Squared distance of two pyramids, weighted by a Gaussian at every ground-truth box.

    The backbone level of arXiv 2006.13108, the formula by readers' accounts, its constants our choice. On a level's
    map, for a box with centre (x0, y0), width w and height h in map pixels,
    ``M(x, y) = exp(-(x - x0)^2 / (sigma^2 (w/2)^2) - (y - y0)^2 / (sigma^2 (h/2)^2))`` at the integer pixels (x, y)
    inside the box, 0 outside, the maximum where boxes overlap. A level's loss is
    ``sum M |F_S - F_T|^2 / (2 N_a)``, summed over the batch and the channels, ``N_a = max(1, sum M)``; the result is
    the mean over levels.

    Args:
        student_features, teacher_features: L tensors (N, C, H_l, W_l), level by level of one shape; float16, bfloat16,
            float32 or float64, any strides.
        gt_boxes: N tensors (G_n, 4) xyxy, input pixels; boxes without area or not finite are left out.
        scales: map pixels per input pixel, one a level.
        sigma_squared: sigma^2.

    Returns:
        A scalar of the accumulation dtype; gradients flow into the student's features only.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, or teacher features that require grad.
    """
    checks.check_same_pyramids(student_features, teacher_features, scales)
    first = student_features[0]
    checks.check_gaussian(gt_boxes, first, sigma_squared)
    if not has_kernels(first.device):
        return reference.gaussian_feature_loss(
            student_features, teacher_features, gt_boxes, scales=scales, sigma_squared=sigma_squared
        )
    if checks.checking_values():
        checks.check_box_values("gt_boxes", gt_boxes)
    boxes = checks.as_regions(gt_boxes, first.shape[0], first.device)
    scales = list(map(float, scales))
    tensors = (boxes, *student_features, *teacher_features)
    return _GaussianLoss.apply(scales, float(sigma_squared), *tensors)


class _GaussianLoss(torch.autograd.Function):
    """The gradient is made in the backward pass, from the inputs.

    To make it with the loss and scale it later takes longer, and would keep a pyramid in between.
    """

    @staticmethod
    def forward(ctx, scales, sigma_squared, boxes, *features):
        levels = len(scales)
        loss, mask_sums = torch.ops.tardkd.gaussian_feature_loss(
            features[:levels], features[levels:], boxes, scales, sigma_squared
        )
        ctx.save_for_backward(mask_sums, boxes, *features)
        ctx.scales, ctx.sigma_squared = scales, sigma_squared
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        mask_sums, boxes, *features = ctx.saved_tensors
        levels = len(ctx.scales)
        gradients = torch.ops.tardkd.gaussian_feature_loss_backward(
            features[:levels], features[levels:], boxes, ctx.scales, ctx.sigma_squared, mask_sums, upstream
        )
        return None, None, None, *gradients, *[None] * levels
