"""What the losses over shared regions are called with: their signatures, checked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import checks
from .inputs import Pooling, RegionCall, RegionInputs
from .maps import channels_differ
from .spec import (
    Activation,
    Background,
    BinWeight,
    BoxCoding,
    ClassificationGate,
    FeatureGate,
    FeatureLoss,
    FeatureNorm,
    LossSpec,
    Reduction,
    RegressionGate,
    RoIAlignSpec,
)
from .tap import FeatureTap


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
    feature_loss: FeatureLoss = "squared",
    bin_weight: BinWeight = "uniform",
    feature_gate: FeatureGate = "either",
    classification_gate: ClassificationGate = "teacher_better",
    regression_gate: RegressionGate = "vs_proposal",
    temperature: float = 1.0,
    beta: float = 1 / 9,
    box_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
    background: Background = "first",
    activation: Activation = "softmax",
    region_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    box_coding: BoxCoding = "deltas",
    student_levels: Tensor | None = None,
    teacher_levels: Tensor | None = None,
    student_scores: Tensor | None = None,
    teacher_scores: Tensor | None = None,
    feature_norm: FeatureNorm = "none",
    tap: FeatureTap | None = None,
) -> RegionCall:
    """Gates and the three distillation losses of R shared regions, fused, from the two feature pyramids.

    After "Distilling Object Detectors with Task Adaptive Regularization" (arXiv 2006.13108). For region i with
    proposal P_i, class y_i and matched ground-truth box g_i, the gates m_i in {0, 1} decide what the teacher may teach;
    a region whose gates are closed costs nothing. With w_i the region weights:

    - feature: ``sum_i w_i m_i l_i / max(1, sum_i m_i)``, ``l_i`` the mean over channels and bins of ``rho(d_i)``, where
      ``d_i = RoIAlign(F_S, P_i) - RoIAlign(F_T, P_i)``;
    - classification: the same sum over ``T^2 KL(softmax(z_T / T) || softmax(z_S / T))``, or the sum over classes of the
      binary form with ``activation="sigmoid"``;
    - regression: the same sum over ``smoothL1_beta(r_S[y_i], r_T[y_i])`` added up over the four deltas, or over the
      four differences of the two boxes in the frame of P_i with ``box_coding="boxes"``.

    Args:
        student_features: the student's pyramid, L tensors (N, C, H_l, W_l), at most 8, finest first; float16, bfloat16,
            float32 or float64; contiguous, channels_last or any strides. C may differ from level to level; ``l_i`` is
            the mean over the channels of the region's own level.
        teacher_features: the teacher's, with the same N and C; levels, sizes, strides and dtype may differ. Where C
            differs from level to level, the teacher has as many levels with the same C, and pools each region from the
            student's level, also where its scales would say another.
        proposals: (R, 5) image index and xyxy, or N tensors (R_n, 4) xyxy; student-input pixels, float32 (or float64).
        student_logits, teacher_logits: (R, K + 1), or (R, K) with ``activation="sigmoid"``.
        student_deltas, teacher_deltas: (R, 4) class-agnostic, or (R, 4K) or (R, 4(K + 1)) class-specific; boxes in
            their place with ``box_coding="boxes"``.
        labels: (R,) int64 assigned classes; the background is 0 or K, see ``background``. A label outside [0, K] (say
            -1, ignore) leaves the region out.
        gt_boxes: (R, 4) xyxy of the matched ground-truth boxes, student-input pixels; rows of background regions are
            ignored.
        student_scales: map pixels per student-input pixel, one a level, e.g. ``(1/4, 1/8, 1/16, 1/32)``.
        teacher_scales: the same for the teacher's maps, in student-input pixels too; None: the student's.
        output_size: bins a side, an int or (height, width).
        sampling_ratio: samples a bin and axis; 0 or less: adaptive, ``ceil(region / bins)``.
        aligned, canonical_scale, canonical_level: as in torchvision's ``roi_align`` and ``MultiScaleRoIAlign``. Each
            side picks the level of a region by its own scales.
        feature_loss: rho: "squared", "absolute" or "smooth_l1" (with ``beta``).
        bin_weight: "uniform", or "gaussian": rho of a bin times the Gaussian of g_i (sigma^2 = 2, sigma in half
            extents; 0 outside g_i) at the bin's centre.
        feature_gate: "all", "foreground", "classification" or "regression" (that gate), or "either": foreground and one
            of the two.
        classification_gate: "all", "foreground", or "teacher_better": foreground and p_T(y_i) > p_S(y_i).
        regression_gate: "foreground", "vs_proposal": foreground and IoU(decode(r_T), g_i) > IoU(P_i, g_i), or
            "vs_student": against IoU(decode(r_S), g_i).
        temperature: T, of the classification loss only. With CUDA kernels in float32 that loss is a difference of
            nearly equal numbers at high temperatures: its absolute error is about ``1e-7 T^2``.
        beta: smooth-L1 threshold; 0: absolute error.
        box_weights: of the box coder, (dx, dy, dw, dh).
        background: where the background stands among the labels, and with softmax among the columns of the logits:
            "first" (torchvision: 0, and classes are 1..K) or "last" (Detectron2, MMDetection: K, and classes are
            0..K-1). It is about the labels with sigmoid logits, too, which have K columns either way: both conventions
            use the labels 0..K, so that a wrong choice cannot be told from them.
        activation: "softmax", or "sigmoid" for logits without a background column.
        region_weights: (R,) w_i; multiplies the numerators, not the counts. None: ones.
        reduction: "mean" as above, "sum" without the division, "none": (R,) a term.
        box_coding: what ``student_deltas`` and ``teacher_deltas`` hold. "deltas": those of Faster R-CNN's box coder,
            relative to P_i. "boxes": xyxy in student-input pixels, in the same columns. Then the regression term
            compares the boxes' centres and sizes, ``(wx dx / w, wy dy / h, ww dw / w, wh dh / h)`` with dx, dy, dw and
            dh the student's less the teacher's, (wx, wy, ww, wh) the ``box_weights``, and w and h the sides of P_i, of
            which each counts at least one pixel: to first order what the deltas would differ by, but without a
            logarithm, so that an inverted or a huge box has a finite loss and gradient. For the gates' IoU an inverted
            box is empty.
        student_levels, teacher_levels: (R,) int64 or int32, the level of each region in that side's pyramid where no
            rule is to choose it, as for the cells of a dense head, which know theirs. None: by the rule. Where both
            sides' levels are equal, pass one tensor for both: equal pyramids are then read in one pass, as by the rule.
            Where C differs from level to level, the teacher's go with the student's, and a region whose two levels
            differ in C is left out.
        student_scores, teacher_scores: (R,) what ``classification_gate="teacher_better"`` compares, and ``scores``
            tell, in the place of p_S(y_i) and p_T(y_i), such as their products with a centerness. No gradient flows
            into them. None: the probabilities.
        feature_norm: "none", or "channel": both sides' features are standardised before they are compared, every
            channel of a level to mean 0 and variance 1 (+ 1e-6) over all images and pixels of the call. The term then
            compares patterns, whatever either model's scale and offset: with "squared" it is about ``2 (1 - r)``, r the
            correlation of the two sides, twice what PKD (arXiv 2207.02039) minimises for whole maps. The gradient goes
            through the statistics too, so that it reaches all pixels of a map. The statistics are those of this
            process, and a NaN anywhere in a map spoils them.
        tap: what :func:`tardkd.ops.tap_features` made of ``student_features``: their gradient is added to the one that
            the detector's own losses have for them, in place. None: autograd adds the two pyramids.

    Returns:
        :class:`RegionLosses`: the three losses, ``gates`` (R, 3) and ``scores`` (R, 4). Gradients flow into the
        student's features, logits and deltas only. Ties leave a gate closed. A region with a non-finite box, an image
        index or a level out of range or such a label contributes nothing (``TARDKD_CHECK=1``: raises).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, an unknown option, or a teacher tensor that
            requires grad.
    """
    given = RegionInputs(
        proposals,  # type: ignore[arg-type]
        student_logits,
        teacher_logits,
        student_deltas,
        teacher_deltas,
        labels,
        gt_boxes,
        region_weights,
        student_levels,
        teacher_levels,
        student_scores=student_scores,
        teacher_scores=teacher_scores,
    )
    is_plain = checks.fit(given, activation, pyramids=(student_features, teacher_features))
    if not is_plain:
        checks.check_pyramids(student_features, teacher_features, same_channels=False)
    scales = checks.checked_scales(student_features, teacher_features, student_scales, teacher_scales)
    if teacher_levels is not None and student_levels is None and channels_differ(student_features):
        raise ValueError(
            "teacher_levels go with student_levels where channels differ from level to level: a region needs levels of "
            "equal channels"
        )
    align = RoIAlignSpec.checked(output_size, sampling_ratio, aligned, canonical_scale, canonical_level)
    loss = LossSpec(
        feature_loss,
        bin_weight,
        feature_gate,
        classification_gate,
        regression_gate,
        temperature,
        beta,
        box_weights,
        background,
        activation,
        reduction,
        box_coding,
        feature_norm,
    ).checked()
    if not is_plain:
        given = checks.checked_region_inputs(
            given,
            loss=loss,
            like=student_features[0],
            num_images=student_features[0].shape[0],
            pyramids=(student_features, teacher_features),
        )
    pooling = Pooling(*scales, align)
    if tap is not None:
        if not isinstance(tap, FeatureTap):
            raise TypeError(f"tap must be what tap_features returns, got {type(tap).__name__}")
        tap.check(student_features)
    return RegionCall(list(student_features), list(teacher_features), given, loss, pooling, tap)


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
    feature_loss: FeatureLoss = "squared",
    bin_weight: BinWeight = "uniform",
    feature_gate: FeatureGate = "either",
    classification_gate: ClassificationGate = "teacher_better",
    regression_gate: RegressionGate = "vs_proposal",
    temperature: float = 1.0,
    beta: float = 1 / 9,
    box_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
    background: Background = "first",
    activation: Activation = "softmax",
    region_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    box_coding: BoxCoding = "deltas",
    student_scores: Tensor | None = None,
    teacher_scores: Tensor | None = None,
    feature_norm: FeatureNorm = "none",
) -> RegionCall:
    """:func:`region_distill_loss` on regions that the detectors' own box heads have pooled already.

    Args:
        student_pooled, teacher_pooled: (R, C, p_h, p_w), of one shape.
        proposals: the regions' boxes; their image index is not looked at.
        feature_norm: as there; a channel's statistics are over all regions of the call, open or not, and their bins.

    The other arguments, the results and the errors are those of :func:`region_distill_loss`.
    """
    given = RegionInputs(
        proposals,  # type: ignore[arg-type]
        student_logits,
        teacher_logits,
        student_deltas,
        teacher_deltas,
        labels,
        gt_boxes,
        region_weights,
        student_scores=student_scores,
        teacher_scores=teacher_scores,
    )
    is_plain = checks.fit(given, activation, pooled=(student_pooled, teacher_pooled))
    if not is_plain:
        checks.check_pooled(student_pooled, teacher_pooled)
    loss = LossSpec(
        feature_loss,
        bin_weight,
        feature_gate,
        classification_gate,
        regression_gate,
        temperature,
        beta,
        box_weights,
        background,
        activation,
        reduction,
        box_coding,
        feature_norm,
    ).checked()
    if not is_plain:
        given = checks.checked_region_inputs(given, loss=loss, like=student_pooled, num_images=None)
        axes = ("R", "C", "h", "w")
        checks.check_per_region("student_pooled", student_pooled, axes, checks.FEATURE_DTYPES, given.proposals)
    return RegionCall([student_pooled], [teacher_pooled], given, loss, None)


def head_distill_loss(
    proposals: Tensor | Sequence[Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_deltas: Tensor,
    teacher_deltas: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
    *,
    classification_gate: ClassificationGate = "teacher_better",
    regression_gate: RegressionGate = "vs_proposal",
    temperature: float = 1.0,
    beta: float = 1 / 9,
    box_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
    background: Background = "first",
    activation: Activation = "softmax",
    region_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    box_coding: BoxCoding = "deltas",
    student_scores: Tensor | None = None,
    teacher_scores: Tensor | None = None,
) -> RegionCall:
    """:func:`region_distill_loss` of what the heads say alone, for regions whose features are not compared.

    Args:
        proposals: the regions' boxes; their image index is not looked at.

    The other arguments and the errors are those of :func:`region_distill_loss`.

    Returns:
        :class:`RegionLosses`, of which ``feature`` is 0, and the feature column of ``gates`` tells whether one of the
        other two gates of a foreground region is open.
    """
    given = RegionInputs(
        proposals,  # type: ignore[arg-type]
        student_logits,
        teacher_logits,
        student_deltas,
        teacher_deltas,
        labels,
        gt_boxes,
        region_weights,
        student_scores=student_scores,
        teacher_scores=teacher_scores,
    )
    is_plain = checks.fit(given, activation)
    if not is_plain:
        checks.check_tensor("student_logits", student_logits, ("R", "K"), checks.FEATURE_DTYPES)
    loss = LossSpec(
        classification_gate=classification_gate,
        regression_gate=regression_gate,
        temperature=temperature,
        beta=beta,
        box_weights=box_weights,
        background=background,
        activation=activation,
        reduction=reduction,
        box_coding=box_coding,
    ).checked()
    if not is_plain:
        given = checks.checked_region_inputs(
            given, loss=loss, like=student_logits, num_images=None, like_name="student_logits"
        )
    return RegionCall([], [], given, loss, None)
