"""What the ops take and give: named tensors with their shapes.

N images, R regions of all images together, K classes, C channels, L levels. A *call* is everything that one call of an
op was given, checked: its tensors and its settings. ``pack`` and ``unpack`` alone know the order of the flat arguments
that torch's dispatcher takes; ``tensors``, ``with_tensors`` and ``gradients`` know the order in which autograd sees the
tensors of a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .maps import Layout
from .spec import LossSpec, Reduction, RoIAlignSpec


class RegionInputs(NamedTuple):
    """Everything about the regions except their features; boxes are xyxy in student-input pixels."""

    proposals: Tensor  # (R, 5) image index, x1, y1, x2, y2; float32 or float64
    student_logits: Tensor  # (R, K + 1), or (R, K) of a sigmoid head
    teacher_logits: Tensor  # (R, K + 1) or (R, K), as the student's
    student_deltas: Tensor  # (R, 4), (R, 4 K) or (R, 4 (K + 1)); boxes in their place with box_coding="boxes"
    teacher_deltas: Tensor  # (R, 4), (R, 4 K) or (R, 4 (K + 1)), not necessarily as the student's
    labels: Tensor  # (R,) int64
    gt_boxes: Tensor  # (R, 4) float32 or float64
    region_weights: Tensor | None = None  # (R,); None: ones
    student_levels: Tensor | None = None  # (R,) int64 level of the pyramid; None: by the level rule
    teacher_levels: Tensor | None = None  # the same on the teacher's side; None where the features are pooled already
    student_scores: Tensor | None = None  # (R,) what the class gate compares; None: the logits' p_S(y)
    teacher_scores: Tensor | None = None  # (R,); None: p_T(y)
    # What standardises the channels: for each level the factors (C_l,) and then the means (C_l,), in the accumulation
    # dtype, in one tensor (2 C_1 + ... + 2 C_L,). None: the features are taken as they are.
    student_norms: Tensor | None = None
    teacher_norms: Tensor | None = None


class RegionLosses(NamedTuple):
    """The three losses of a set of shared regions, and the decisions behind them.

    ``R`` is the number of regions. The losses are scalars, or ``(R,)`` with ``reduction="none"``; they and
    ``scores`` have the accumulation dtype (float64 for float64 inputs, float32 otherwise). ``gates`` and
    ``scores`` carry no gradient.
    """

    feature: Tensor  # () or (R,)
    classification: Tensor  # () or (R,)
    regression: Tensor  # () or (R,)
    gates: Tensor  # (R, 3) bool: feature, classification, regression
    scores: Tensor  # (R, 4): p_T(y), p_S(y), IoU of the teacher's box, IoU it was compared with


class RegionResults(NamedTuple):
    """What the kernels of the region losses write.

    The gradients are those for an upstream gradient of one, still to be multiplied by their term's factor. A gradient
    that was not wanted is empty.
    """

    feature: Tensor  # () or (R,), as in RegionLosses
    classification: Tensor  # () or (R,)
    regression: Tensor  # () or (R,)
    gates: Tensor  # (R, 3) bool
    scores: Tensor  # (R, 4)
    factors: Tensor  # (3,) of the gradients of features, logits and deltas
    grad_logits: Tensor  # (R, columns of the student's logits)
    grad_deltas: Tensor  # (R, columns of the student's deltas)
    # The pyramid's in one flat tensor, see maps.py, or what Kernels.leaves_pixels says; of pooled features (R, C, p_h,
    # p_w).
    grad_features: Tensor

    def losses(self) -> RegionLosses:
        return RegionLosses(self.feature, self.classification, self.regression, self.gates, self.scores)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of features, logits and deltas, in the order of the terms and of :class:`Wants`."""
        return self.grad_features, self.grad_logits, self.grad_deltas


class Wants(NamedTuple):
    """Which of the student's tensors are to get a gradient."""

    features: bool
    logits: bool
    deltas: bool


NO_GRADIENTS = Wants(False, False, False)


# --- calls ------------------------------------------------------------------------------------------------------------


class Pooling(NamedTuple):
    """How regions are pooled from the two pyramids."""

    student_scales: list[float]  # (L_student,) map pixels per student-input pixel
    teacher_scales: list[float]  # (L_teacher,) map pixels per student-input pixel
    align: RoIAlignSpec


class Tap(Protocol):
    """Where the features' gradient is added to others: a ``FeatureTap`` of ``tap.py``."""

    def take(self, call: RegionCall) -> Tensor | None:
        """The scalar () that the loss takes in to add its features' gradient here; None: it has to do so by itself."""


class RegionCall(NamedTuple):
    """A call of a loss over shared regions.

    The features are those of the pyramids, L x (N, C_l, H_l, W_l), for ``region_distill_loss``; the one tensor
    (R, C, p_h, p_w) of pooled features for ``pooled_distill_loss``; none for ``head_distill_loss``.
    """

    student_features: list[Tensor]
    teacher_features: list[Tensor]
    inputs: RegionInputs
    loss: LossSpec
    pooling: Pooling | None  # None: there are no pyramids
    tap: Tap | None = None  # where the features' gradient is added; None: wherever autograd adds it

    @property
    def op(self) -> str:
        """Name of the registered op."""
        if self.pooling is not None:
            return "region_distill"
        return "pooled_distill" if self.student_features else "head_distill"

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors in one row, as autograd wants them."""
        return (*self.student_features, *self.teacher_features, *self.inputs)

    def with_tensors(self, tensors: Sequence[Any]) -> RegionCall:
        """The same settings with ``tensors``, in the order of :meth:`tensors`."""
        students = len(self.student_features)
        teachers = students + len(self.teacher_features)
        return RegionCall(
            list(tensors[:students]),
            list(tensors[students:teachers]),
            RegionInputs(*tensors[teachers:]),
            self.loss,
            self.pooling,
        )

    def without_tensors(self) -> RegionCall:
        """The settings alone, for autograd, which must see all tensors itself."""
        student, teacher = ([None] * len(features) for features in (self.student_features, self.teacher_features))
        return RegionCall(student, teacher, _NO_INPUTS, self.loss, self.pooling)  # type: ignore[arg-type]

    def with_norms(self, student_norms: Tensor, teacher_norms: Tensor) -> RegionCall:
        """The same with standardised features; see :class:`RegionInputs`."""
        return self._replace(inputs=self.inputs._replace(student_norms=student_norms, teacher_norms=teacher_norms))

    def unreduced(self) -> RegionCall:
        """The same with a loss for every region."""
        return self._replace(loss=self.loss._replace(reduction="none"))

    def gradients(
        self, features: Sequence[Tensor | None], logits: Tensor | None, deltas: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the student's tensors, in the order of :meth:`tensors`; None for all others."""
        heads = {"student_logits": logits, "student_deltas": deltas}
        return (*features, *(None for _ in self.teacher_features), *map(heads.get, RegionInputs._fields))

    def pack(self, wants: Wants, upstream: Tensor | None = None) -> tuple[Any, ...]:
        """The registered op's arguments.

        Args:
            wants: the gradients that it is to make.
            upstream: (3, R) gradients of every region's three terms; None: ones.
        """
        common = (*self.inputs, upstream, wants, *self.loss)
        if self.pooling is None:
            return (*self.student_features, *self.teacher_features, *common)
        student_scales, teacher_scales, align = self.pooling
        return (self.student_features, self.teacher_features, *common, student_scales, teacher_scales, *align)

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> tuple[RegionCall, Wants, Tensor | None]:
        """Call, ``wants`` and ``upstream`` from the registered op's arguments."""
        first = 0 if len(packed) == _COMMON else 2
        features, common, pooling = packed[:first], packed[first : first + _COMMON], packed[first + _COMMON :]
        inputs, loss = RegionInputs(*common[:_UPSTREAM]), LossSpec(*common[_UPSTREAM + 2 :])
        upstream, wants = common[_UPSTREAM], Wants(*common[_UPSTREAM + 1])
        if not pooling:
            return cls(list(features[:1]), list(features[1:]), inputs, loss, None), wants, upstream
        student, teacher = features
        student_scales, teacher_scales, *align = pooling
        pooling = Pooling(student_scales, teacher_scales, RoIAlignSpec(*align))
        return cls(student, teacher, inputs, loss, pooling), wants, upstream


_NO_INPUTS: Any = RegionInputs(*[None] * len(RegionInputs._fields))  # type: ignore[arg-type]

# What every packed RegionCall has, between the features before it and what only pyramids need behind it: how many
# arguments, and which of them is the upstream gradient.
_UPSTREAM = len(RegionInputs._fields)
_COMMON = _UPSTREAM + 2 + len(LossSpec._fields)


class RegionBackward(NamedTuple):
    """What the features' gradient of ``region_distill_loss`` is made of where the last step was left."""

    grad_pooled: Tensor  # RegionResults.grad_features
    gates: Tensor  # (R, 3) bool
    factor: Tensor | None  # () of the accumulation dtype, of the whole gradient; None: 1
    student_features: list[Tensor]  # L x (N, C_l, H_l, W_l); what they hold is not looked at
    proposals: Tensor  # (R, 5) image index, x1, y1, x2, y2; student-input pixels
    levels: Tensor | None  # (R,) int64; None: by the level rule
    scales: list[float]  # (L,) map pixels per student-input pixel
    align: RoIAlignSpec

    @classmethod
    def of(cls, call: RegionCall, grad_pooled: Tensor, gates: Tensor, factor: Tensor | None) -> RegionBackward:
        """``call``: of which at least the student's features, proposals and levels are there."""
        assert call.pooling is not None, "region_distill pools from pyramids"
        scales, _, align = call.pooling
        regions = call.inputs.proposals, call.inputs.student_levels
        return cls(grad_pooled, gates, factor, call.student_features, *regions, scales, align)

    def pack(self) -> tuple[Any, ...]:
        *others, align = self
        return (*others, *align)

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> RegionBackward:
        grad_pooled, gates, factor, features, proposals, levels, scales, *align = packed
        return cls(grad_pooled, gates, factor, features, proposals, levels, scales, RoIAlignSpec(*align))


class AlignCall(NamedTuple):
    """A call of ``multiscale_roi_align``."""

    features: list[Tensor]  # L x (N, C, H_l, W_l)
    proposals: Tensor  # (R, 5) image index, x1, y1, x2, y2; input pixels
    levels: Tensor | None  # (R,) int64; None: by the level rule
    scales: list[float]  # (L,) map pixels per input pixel
    align: RoIAlignSpec

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors in one row."""
        return (*self.features, self.proposals, self.levels)

    def pack(self) -> tuple[Any, ...]:
        return (self.features, self.proposals, self.levels, self.scales, *self.align)

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> AlignCall:
        features, proposals, levels, scales, *align = packed
        return cls(features, proposals, levels, scales, RoIAlignSpec(*align))


class AlignBackward(NamedTuple):
    """What the gradient of ``multiscale_roi_align`` is made of."""

    grad_pooled: Tensor  # (R, C, p_h, p_w)
    proposals: Tensor  # (R, 5) image index, x1, y1, x2, y2; input pixels
    levels: Tensor | None  # (R,) int64; None: by the level rule
    layout: Layout  # of the features' gradient
    scales: list[float]  # (L,) map pixels per input pixel
    align: RoIAlignSpec

    def pack(self) -> tuple[Any, ...]:
        return (self.grad_pooled, self.proposals, self.levels, *self.layout, self.scales, *self.align)

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> AlignBackward:
        grad_pooled, proposals, levels, sizes, channels_last, scales, *align = packed
        return cls(grad_pooled, proposals, levels, Layout(sizes, channels_last), scales, RoIAlignSpec(*align))


class GaussianCall(NamedTuple):
    """A call of ``gaussian_feature_loss``."""

    student_features: list[Tensor]  # L x (N, C_l, H_l, W_l)
    teacher_features: list[Tensor]  # L x (N, C_l, H_l, W_l)
    gt_boxes: Tensor  # (G, 5) image index, x1, y1, x2, y2; input pixels
    scales: list[float]  # (L,) map pixels per input pixel
    sigma_squared: float

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.student_features, *self.teacher_features, self.gt_boxes)

    def with_tensors(self, tensors: Sequence[Any]) -> GaussianCall:
        """The same settings with ``tensors``, in the order of :meth:`tensors`."""
        levels = len(self.scales)
        *features, gt_boxes = tensors
        return self._replace(student_features=features[:levels], teacher_features=features[levels:], gt_boxes=gt_boxes)

    def without_tensors(self) -> GaussianCall:
        """The settings alone, for autograd, which must see all tensors itself."""
        return self.with_tensors([None] * len(self.tensors()))

    def pack(self) -> tuple[Any, ...]:
        return tuple(self)

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> GaussianCall:
        return cls(*packed)


class GaussianBackward(NamedTuple):
    """What the gradient of ``gaussian_feature_loss`` is made of."""

    call: GaussianCall
    mask_sums: Tensor  # (L,) float64, what the forward pass returned
    upstream: Tensor  # () gradient of the loss

    def pack(self) -> tuple[Any, ...]:
        return (*self.call.pack(), self.mask_sums, self.upstream)

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> GaussianBackward:
        *call, mask_sums, upstream = packed
        return cls(GaussianCall.unpack(call), mask_sums, upstream)


class DistributionCall(NamedTuple):
    """A call of ``distribution_distill_loss``."""

    student_distributions: Tensor  # (R, 4, bins)
    teacher_distributions: Tensor  # (R, 4, bins)
    gates: Tensor  # (R,) bool
    region_weights: Tensor | None  # (R,); None: ones
    temperature: float
    reduction: Reduction

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:4]

    def with_tensors(self, tensors: Sequence[Any]) -> DistributionCall:
        """The same settings with ``tensors``, in the order of :meth:`tensors`."""
        student, teacher, gates, weights = tensors
        return DistributionCall(student, teacher, gates, weights, self.temperature, self.reduction)

    def without_tensors(self) -> DistributionCall:
        """The settings alone, for autograd, which must see all tensors itself."""
        return self.with_tensors([None] * 4)


class DistributionBackward(NamedTuple):
    """What the gradient of ``distribution_distill_loss`` is made of."""

    call: DistributionCall
    upstream: Tensor  # (R,) gradients of every region's term

    def pack(self) -> tuple[Any, ...]:
        return (*self.call, self.upstream)

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> DistributionBackward:
        *call, upstream = packed
        return cls(DistributionCall(*call), upstream)
