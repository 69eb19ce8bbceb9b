"""Gaussian-mask loss over whole feature maps; the mask is never materialised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, reference
from .fallback import has_kernels
from .gradients import once_differentiable, scale_gradient, wanted
from .registry import defers


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
    ``sum M |F_S - F_T|^2 / (2 N_a)``, summed over the batch and the channels, ``N_a = max(1, sum M)``; the result is the
    mean over levels.

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
    if wanted(*student_features):
        loss = _DeferredGaussianLoss if defers("gaussian_feature_loss", first.device) else _GaussianLoss
        return loss.apply(scales, float(sigma_squared), *tensors)
    return _run(scales, float(sigma_squared), tensors, False)[0]


def _run(scales: list[float], sigma_squared: float, tensors: Sequence[Tensor], want_grad: bool) -> tuple:
    """The registered op: the loss, the sums of the masks, the gradients."""
    boxes, *features = tensors
    levels = len(scales)
    return torch.ops.tardkd.gaussian_feature_loss(
        features[:levels], features[levels:], boxes, scales, sigma_squared, want_grad
    )


class _GaussianLoss(torch.autograd.Function):
    """Gradients in the forward pass."""

    @staticmethod
    def forward(ctx, scales, sigma_squared, *tensors):
        loss, _, gradients = _run(scales, sigma_squared, tensors, True)
        ctx.save_for_backward(*gradients)
        ctx.dtype = tensors[1].dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        gradients = [scale_gradient(gradient, upstream, ctx.dtype) for gradient in ctx.saved_tensors]
        return None, None, None, *gradients, *[None] * len(gradients)


class _DeferredGaussianLoss(torch.autograd.Function):
    """Gradients in the backward pass, from the inputs."""

    @staticmethod
    def forward(ctx, scales, sigma_squared, *tensors):
        loss, mask_sums, _ = _run(scales, sigma_squared, tensors, False)
        ctx.save_for_backward(mask_sums, *tensors)
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
