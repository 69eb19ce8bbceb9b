"""What can be chosen about a distillation; a wrong value is an error that names it.

The comment behind a field is its meaning on the page of all settings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tardkd.detectors.base import HeadSettings
from tardkd.ops.spec import (
    BinWeight,
    ClassificationGate,
    FeatureGate,
    FeatureLoss,
    FeatureNorm,
    LossSpec,
    Reduction,
    RegressionGate,
)

Sharing = Literal["student", "teacher", "both"]
Balancing = Literal["gradient", "none"]
FeaturePath = Literal["auto", "pooled", "pyramid"]
ScheduleKind = Literal["linear", "constant", "cosine", "step"]
ScheduleUnit = Literal["epoch", "iteration"]


def _check_choices(settings: Any) -> None:
    """Every field whose type is a Literal must hold one of its values."""
    for key, hint in get_type_hints(type(settings)).items():
        choices, value = get_args(hint), getattr(settings, key)
        if get_origin(hint) is Literal and value not in choices:
            raise ValueError(f"{type(settings).__name__}.{key} is {value!r}; choose one of {', '.join(choices)}")


def _check_number(settings: Any, key: str, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """The field must hold a number between ``low`` and ``high``, and not ``low`` itself with ``open_low``."""
    owner, value = type(settings).__name__, getattr(settings, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}.{key} must be a number, got {value!r}")
    above = value > low if open_low else value >= low
    if not (math.isfinite(value) and above and value <= high):
        bounds = f"{'(' if open_low else '['}{low}, {high}{']' if math.isfinite(high) else ')'}"
        raise ValueError(f"{owner}.{key} is {value!r}; it must be in {bounds}")


@dataclass(frozen=True)
class ScheduleSettings:
    """How the weight lambda of all terms moves; see :class:`tardkd.distill.schedule.Schedule`."""

    kind: ScheduleKind = "linear"  # how lambda falls over the training; constant: it does not
    per: ScheduleUnit = "epoch"  # whether lambda moves once an epoch or once an iteration
    warmup: int = 0  # iterations over which lambda rises from 0 to its value
    stop: float = 1.0  # share of the training after which lambda is 0; 1: it never stops
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)  # shares of the training at which "step" multiplies lambda by gamma
    gamma: float = 0.1  # what "step" multiplies lambda by at each milestone

    def __post_init__(self) -> None:
        _check_choices(self)
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int):
            raise TypeError(f"ScheduleSettings.warmup must be an int (iterations), got {self.warmup!r}")
        _check_number(self, "warmup", 0)
        _check_number(self, "stop", 0.0, 1.0, open_low=True)
        _check_number(self, "gamma", 0.0, 1.0)
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if list(self.milestones) != sorted(self.milestones) or any(not 0 < m < 1 for m in self.milestones):
            raise ValueError(
                f"ScheduleSettings.milestones is {self.milestones!r}; they are shares of the training, "
                "rising, each between 0 and 1"
            )


@dataclass(frozen=True)
class DistillSettings:
    """Weights, gates and losses of a distillation.

    The page on the method says which defaults are the paper's and which are ours.
    """

    # --- the terms: a term of weight 0 is left out
    # gradient: a term of weight 1 pulls at the student as strongly as the detector's losses; none: it is a factor
    balance: Balancing = "gradient"
    feature: float = 1.0  # weight of the term that compares the pooled features of each region
    classification: float = 1.0  # weight of the term that compares the class logits of each region
    regression: float = 1.0  # weight of the term that compares the box deltas of each region
    gaussian: float = 0.0  # weight of the term that compares whole feature maps, under a Gaussian at every object
    # weight of the term that compares distributions over each side of a box, of two heads that have them, as D-FINE's
    distribution: float = field(default=0.0, kw_only=True)

    # --- the regions that both models are asked about, and which of them transfer
    # whose proposals become the shared regions
    sharing: Sharing = "student"
    # regions whose features transfer; either: those of the foreground where one of the two other gates is open
    feature_gate: FeatureGate = "either"
    # regions whose logits transfer; teacher_better: those where the teacher is surer of the true class
    classification_gate: ClassificationGate = "teacher_better"
    # regions whose deltas transfer; vs_proposal, vs_student: those where the teacher's box is better than that one
    regression_gate: RegressionGate = "vs_proposal"

    # --- the losses
    temperature: float = 1.0  # what the class and the distribution term divide logits by before the softmax
    beta: float = 1 / 9  # smooth-L1 threshold of the deltas, and of the features with feature_loss smooth_l1
    feature_loss: FeatureLoss = "squared"  # how the difference of two features is measured
    # channel: each channel of both sides is standardised first, so that models of unlike scales need no other weight
    feature_norm: FeatureNorm = "channel"
    bin_weight: BinWeight = "uniform"  # weight of a region's bins; gaussian: those near the object's centre count more
    sigma_squared: float = 2.0  # square of the width of the gaussian term's mask, which is measured in half box sizes

    # --- how it runs
    # pooled: features are compared as the heads have pooled them; pyramid: both pool again; auto: pooled if possible
    path: FeaturePath = "auto"
    teacher_input_ratio: float | None = None  # the teacher's input size over the student's; null: taken from the models
    teacher_bf16: bool = False  # whether the teacher's trunk runs in bfloat16, whatever the student runs in
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)  # how the weight of all terms moves over time
    check_finite: bool = True  # stop at a loss that is not finite; on a GPU one step later, so that nothing waits

    def __post_init__(self) -> None:
        for key in (*self.weights, "beta"):
            _check_number(self, key, 0.0)
        for key in ("temperature", "sigma_squared"):
            _check_number(self, key, 0.0, open_low=True)
        if self.teacher_input_ratio is not None:
            _check_number(self, "teacher_input_ratio", 0.0, open_low=True)
        _check_choices(self)
        if not isinstance(self.schedule, ScheduleSettings):
            raise TypeError(f"DistillSettings.schedule must be a ScheduleSettings, got {self.schedule!r}")
        if not any(self.weights.values()):
            raise ValueError(
                f"DistillSettings: {', '.join(self.weights)} are all 0; for plain training use Distiller(enabled=False)"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every term by its name."""
        terms = ("feature", "classification", "regression", "gaussian", "distribution")
        return {key: getattr(self, key) for key in terms}

    @property
    def gate_weights(self) -> dict[str, float]:
        """Of each gate, by its name, the weight of the terms that it opens."""
        return {**self.weights, "regression": self.regression + self.distribution}

    @property
    def compares_features(self) -> bool:
        """Whether a term with weight looks at features, so that both models need the same channels."""
        return bool(self.feature or self.gaussian)

    @property
    def foreground_only(self) -> bool:
        """Whether no term with weight looks at a background region."""
        return not (
            (self.feature and self.feature_gate == "all") or (self.classification and self.classification_gate == "all")
        )

    def loss_spec(self, head: HeadSettings, reduction: Reduction) -> LossSpec:
        """What the ops are told about gates and losses, for outputs written in the conventions of ``head``.

        Only a proposal is a guess of the student's. Nearly every box of a teacher is better than an anchor, and none is
        better than a region that is the object itself: there the teacher's box is held against the student's.
        """
        regression_gate = self.regression_gate
        if head.regions != "proposals" and regression_gate == "vs_proposal":
            regression_gate = "vs_student"
        return LossSpec(
            feature_loss=self.feature_loss,
            bin_weight=self.bin_weight,
            feature_gate=self.feature_gate,
            classification_gate=self.classification_gate,
            regression_gate=regression_gate,
            temperature=self.temperature,
            beta=self.beta,
            box_weights=head.box_weights,
            background=head.background,
            activation=head.activation,
            reduction=reduction,
            feature_norm=self.feature_norm,
        )
