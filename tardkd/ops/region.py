"""Losses over shared regions: from the pyramids (:func:`region_distill_loss`) or from pooled regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, reference
from .fallback import has_kernels
from .gradients import once_differentiable, scale_gradient, wanted
from .maps import Layout, layout_of, maps_of
from .registry import defers
from .types import RegionLosses


def region_distill_loss(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    proposals: Tensor | Sequence[Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_deltas: Tensor,
    teacher_deltas: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
    *,
    student_scales: Sequence[float],
    teacher_scales: Sequence[float] | None = None,
    output_size: int | Sequence[int] = 7,
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_scale: float = 224,
    canonical_level: int = 4,
    feature_loss: str = "squared",
    bin_weight: str = "uniform",
    feature_gate: str = "either",
    classification_gate: str = "teacher_better",
    regression_gate: str = "vs_proposal",
    temperature: float = 1.0,
    beta: float = 1 / 9,
    box_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
    background: str = "first",
    activation: str = "softmax",
    region_weights: Tensor | None = None,
    reduction: str = "mean",
) -> RegionLosses:
    """Gates and the three distillation losses of R shared regions, fused, from the two feature pyramids.

    After "Distilling Object Detectors with Task Adaptive Regularization" (arXiv 2006.13108). For region i with
    proposal P_i, class y_i and matched ground-truth box g_i, the gates m_i in {0, 1} decide what the teacher may teach;
    a region whose gates are closed costs nothing. With w_i the region weights:

    - feature: ``sum_i w_i m_i l_i / max(1, sum_i m_i)``, ``l_i`` the mean over channels and bins of ``rho(d_i)``, where
      ``d_i = RoIAlign(F_S, P_i) - RoIAlign(F_T, P_i)``;
    - classification: the same sum over ``T^2 KL(softmax(z_T / T) || softmax(z_S / T))``, or the sum over classes of the
      binary form with ``activation="sigmoid"``;
    - regression: the same sum over ``smoothL1_beta(r_S[y_i], r_T[y_i])`` added up over the four deltas.

    Args:
        student_features: the student's pyramid, L tensors (N, C, H_l, W_l), finest first; float16, bfloat16, float32
            or float64; contiguous, channels_last or any strides.
        teacher_features: the teacher's, with the same N and C; levels, sizes, strides and dtype may differ.
        proposals: (R, 5) image index and xyxy, or N tensors (R_n, 4) xyxy; student-input pixels, float32 (or float64).
        student_logits, teacher_logits: (R, K + 1), or (R, K) with ``activation="sigmoid"``.
        student_deltas, teacher_deltas: (R, 4) class-agnostic, or (R, 4K) or (R, 4(K + 1)) class-specific.
        labels: (R,) int64 assigned classes; the background is 0 or K, see ``background``. A label outside [0, K] (say
            -1, ignore) leaves the region out.
        gt_boxes: (R, 4) xyxy of the matched ground-truth boxes, student-input pixels; rows of background regions are
            ignored.
        student_scales: map pixels per student-input pixel, one a level, e.g. ``(1/4, 1/8, 1/16, 1/32)``.
        teacher_scales: the same for the teacher's maps, in student-input pixels too; None: the student's.
        output_size: bins a side, an int or (height, width).
        sampling_ratio: samples a bin and axis; 0: adaptive, ``ceil(region / bins)``.
        aligned, canonical_scale, canonical_level: as in torchvision's ``roi_align`` and ``MultiScaleRoIAlign``. Each
            side picks the level of a region by its own scales.
        feature_loss: rho: "squared", "absolute" or "smooth_l1" (with ``beta``).
        bin_weight: "uniform", or "gaussian": rho of a bin times the Gaussian of g_i (sigma^2 = 2 half extents, 0
            outside g_i) at the bin's centre.
        feature_gate: "all", "foreground", "classification" or "regression" (that gate), or "either": foreground and one
            of the two.
        classification_gate: "all", "foreground", or "teacher_better": foreground and p_T(y_i) > p_S(y_i).
        regression_gate: "foreground", "vs_proposal": foreground and IoU(decode(r_T), g_i) > IoU(P_i, g_i), or
            "vs_student": against IoU(decode(r_S), g_i).
        temperature: T, of the classification loss only.
        beta: smooth-L1 threshold; 0: absolute error.
        box_weights: of the box coder, (dx, dy, dw, dh).
        background: index of the background: "first" (torchvision) or "last" (Detectron2, MMDetection).
        activation: "softmax", or "sigmoid" for logits without a background column.
        region_weights: (R,) w_i; multiplies the numerators, not the counts. None: ones.
        reduction: "mean" as above, "sum" without the division, "none": (R,) a term.

    Returns:
        :class:`RegionLosses`: the three losses, ``gates`` (R, 3) and ``scores`` (R, 4). Gradients flow into the
        student's features, logits and deltas only. Ties leave a gate closed. A region with a non-finite box, an image
        index out of range or such a label contributes nothing (``TARDKD_CHECK=1``: raises).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, an unknown option, or a teacher tensor that
            requires grad.
    """
    teacher_scales = checks.check_pyramids(student_features, teacher_features, student_scales, teacher_scales)
    checks.check_level_rule(canonical_scale, canonical_level)
    like = student_features[0]
    per_region = (student_logits, teacher_logits, student_deltas, teacher_deltas, labels, gt_boxes, region_weights)
    options = dict(
        feature_loss=feature_loss,
        bin_weight=bin_weight,
        feature_gate=feature_gate,
        classification_gate=classification_gate,
        regression_gate=regression_gate,
        background=background,
        activation=activation,
        reduction=reduction,
    )
    numbers = dict(temperature=temperature, beta=beta, box_weights=box_weights)
    align = dict(
        sampling_ratio=sampling_ratio,
        aligned=aligned,
        canonical_scale=canonical_scale,
        canonical_level=canonical_level,
    )
    if not has_kernels(like.device):
        return reference.region_distill_loss(
            student_features,
            teacher_features,
            proposals,
            *per_region[:-1],
            student_scales=student_scales,
            teacher_scales=teacher_scales,
            output_size=output_size,
            region_weights=region_weights,
            **align,
            **options,
            **numbers,
        )
    regions = checks.check_region_loss(like, like.shape[0], proposals, per_region, options, numbers)
    settings = (
        list(map(float, student_scales)),
        list(map(float, teacher_scales)),
        list(checks.output_pair(output_size)),
        *align.values(),
        *_loss_settings(options, numbers),
    )
    return _call("region_distill", student_features, teacher_features, regions, per_region, settings)


def pooled_distill_loss(
    student_pooled: Tensor,
    teacher_pooled: Tensor,
    proposals: Tensor | Sequence[Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_deltas: Tensor,
    teacher_deltas: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
    *,
    feature_loss: str = "squared",
    bin_weight: str = "uniform",
    feature_gate: str = "either",
    classification_gate: str = "teacher_better",
    regression_gate: str = "vs_proposal",
    temperature: float = 1.0,
    beta: float = 1 / 9,
    box_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
    background: str = "first",
    activation: str = "softmax",
    region_weights: Tensor | None = None,
    reduction: str = "mean",
) -> RegionLosses:
    """:func:`region_distill_loss` on regions that the detectors' own box heads have pooled already.

    Args:
        student_pooled, teacher_pooled: (R, C, p_h, p_w), of one shape.
        proposals: the regions' boxes; their image index is not looked at.

    The other arguments, the results and the errors are those of :func:`region_distill_loss`.
    """
    checks.check_pooled(student_pooled, teacher_pooled)
    per_region = (student_logits, teacher_logits, student_deltas, teacher_deltas, labels, gt_boxes, region_weights)
    options = dict(
        feature_loss=feature_loss,
        bin_weight=bin_weight,
        feature_gate=feature_gate,
        classification_gate=classification_gate,
        regression_gate=regression_gate,
        background=background,
        activation=activation,
        reduction=reduction,
    )
    numbers = dict(temperature=temperature, beta=beta, box_weights=box_weights)
    if not has_kernels(student_pooled.device):
        return reference.pooled_distill_loss(
            student_pooled,
            teacher_pooled,
            proposals,
            *per_region[:-1],
            region_weights=region_weights,
            **options,
            **numbers,
        )
    regions = checks.check_region_loss(student_pooled, None, proposals, per_region, options, numbers)
    checks.check_rows("student_pooled", student_pooled, regions)
    settings = _loss_settings(options, numbers)
    return _call("pooled_distill", [student_pooled], [teacher_pooled], regions, per_region, settings)


def _loss_settings(options: dict[str, str], numbers: dict[str, Any]) -> tuple:
    choices = [names.index(options[key]) for key, names in checks.CHOICES.items()]
    return choices, float(numbers["temperature"]), float(numbers["beta"]), list(map(float, numbers["box_weights"]))


# --- autograd -----------------------------------------------------------------------------------------------------

_NONE = checks.CHOICES["reduction"].index("none")


def _call(
    op: str,
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    regions: Tensor,
    per_region: Sequence[Tensor | None],
    settings: tuple,
) -> RegionLosses:
    student_logits, _, student_deltas, *_ = per_region
    wants = (wanted(*student_features), wanted(student_logits), wanted(student_deltas))
    tensors = (*student_features, *teacher_features, regions, *per_region)
    levels = len(student_features)
    if not any(wants):
        return RegionLosses(*_run(op, settings, wants, levels, tensors, None)[:5])
    unreduced = settings[-4][-1] == _NONE
    loss = _DeferredRegionLoss if unreduced or defers(op, regions.device, settings[-4]) else _RegionLoss
    return RegionLosses(*loss.apply(op, settings, wants, levels, *tensors))


def _run(
    op: str,
    settings: tuple,
    wants: Sequence[bool],
    levels: int,
    tensors: Sequence[Tensor | None],
    upstream: Tensor | None,
) -> tuple[Tensor, ...]:
    """The registered op: five results, the factors, then the gradients of logits, deltas and features."""
    features, others, region_tensors = tensors[:levels], tensors[levels:-8], tensors[-8:]
    sides = (features[0], others[0]) if op == "pooled_distill" else (list(features), list(others))
    return getattr(torch.ops.tardkd, op)(*sides, *region_tensors, upstream, *settings, list(wants))


def _layout(op: str, features: Sequence[Tensor]) -> Layout | None:
    """Of the features' gradient; None: it is a tensor like the feature."""
    return None if op == "pooled_distill" else layout_of(features)


def _dtypes(tensors: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
    """Of the student's features, logits and deltas."""
    return tensors[0].dtype, tensors[-7].dtype, tensors[-5].dtype


def _input_gradients(
    levels: int,
    tensors: int,
    layout: Layout | None,
    features: Tensor | None,
    logits: Tensor | None,
    deltas: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """What a backward pass returns: in the order of the arguments of ``apply``, of which ``tensors`` are tensors."""
    maps = [features] * levels if features is None or layout is None else maps_of(features, *layout)
    teacher = [None] * (tensors - levels - 8)
    return None, None, None, None, *maps, *teacher, None, logits, None, deltas, None, None, None, None


class _RegionLoss(torch.autograd.Function):
    """Gradients in the forward pass, for the scalar reductions, where the device prefers that."""

    @staticmethod
    def forward(ctx, op, settings, wants, levels, *tensors):
        ctx.wants, ctx.levels, ctx.tensors = wants, levels, len(tensors)
        ctx.layout, ctx.dtypes = _layout(op, tensors[:levels]), _dtypes(tensors)
        *results, factors, grad_logits, grad_deltas, grad_features = _run(op, settings, wants, levels, tensors, None)
        ctx.save_for_backward(factors, grad_features, grad_logits, grad_deltas)
        ctx.mark_non_differentiable(results[3], results[4])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        factors, *gradients = ctx.saved_tensors
        scaled = [
            scale_gradient(gradient, upstream[term] * factors[term], dtype)
            if ctx.wants[term] and upstream[term] is not None
            else None
            for term, (gradient, dtype) in enumerate(zip(gradients, ctx.dtypes))
        ]
        return _input_gradients(ctx.levels, ctx.tensors, ctx.layout, *scaled)


class _DeferredRegionLoss(torch.autograd.Function):
    """Gradients in the backward pass: the op runs again, with the upstream gradient of every region's terms.

    With "none" that is not known earlier, and the gradient of a pyramid sums over regions.
    """

    @staticmethod
    def forward(ctx, op, settings, wants, levels, *tensors):
        ctx.op, ctx.settings, ctx.wants, ctx.levels = op, settings, wants, levels
        *results, factors, _, _, _ = _run(op, settings, (False,) * 3, levels, tensors, None)
        ctx.save_for_backward(factors, *tensors)
        ctx.mark_non_differentiable(results[3], results[4])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        factors, *tensors = ctx.saved_tensors
        op, levels, terms = ctx.op, ctx.levels, upstream[:3]
        wants = [want and gradient is not None for want, gradient in zip(ctx.wants, terms)]
        gradients = [None, None, None]
        if any(wants):
            given = next(gradient for gradient in terms if gradient is not None)
            per_region = torch.stack([given if gradient is None else gradient for gradient in terms])
            *options, choices, temperature, beta, box_weights = ctx.settings
            if choices[-1] != _NONE:
                per_region = (per_region * factors)[:, None].expand(-1, tensors[-8].shape[0])
            settings = (*options, [*choices[:-1], _NONE], temperature, beta, box_weights)
            *_, logits, deltas, features = _run(op, settings, wants, levels, tensors, per_region)
            gradients = [
                gradient.to(dtype) if want else None
                for want, gradient, dtype in zip(wants, (features, logits, deltas), _dtypes(tensors))
            ]
        return _input_gradients(levels, len(tensors), _layout(op, tensors[:levels]), *gradients)
