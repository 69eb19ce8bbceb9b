"""What can be chosen about a distillation; a wrong value is an error that names it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

SHARING = ("student", "teacher", "both")
FEATURE_GATES = ("all", "foreground", "classification", "regression", "either")
CLASSIFICATION_GATES = ("all", "foreground", "teacher_better")
REGRESSION_GATES = ("foreground", "vs_proposal", "vs_student")
FEATURE_LOSSES = ("squared", "absolute", "smooth_l1")
BIN_WEIGHTS = ("uniform", "gaussian")
PATHS = ("auto", "pooled", "pyramid")
SCHEDULES = ("linear", "constant", "cosine", "step")
STEP_SIZES = ("epoch", "iteration")


def _one_of(owner: Any, key: str, choices: tuple[str, ...]) -> None:
    value = getattr(owner, key)
    if value not in choices:
        raise ValueError(f"{type(owner).__name__}.{key} is {value!r}; choose one of {', '.join(choices)}")


def _number(owner: Any, key: str, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    value = getattr(owner, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{type(owner).__name__}.{key} must be a number, got {value!r}")
    above = value > low if open_low else value >= low
    if not (math.isfinite(value) and above and value <= high):
        bounds = f"{'(' if open_low else '['}{low}, {high}{']' if math.isfinite(high) else ')'}"
        raise ValueError(f"{type(owner).__name__}.{key} is {value!r}; it must be in {bounds}")


@dataclass(frozen=True)
class ScheduleSettings:
    """How the weight lambda of all terms moves; see :class:`tardkd.distill.schedule.Schedule`."""

    kind: str = "linear"  # linear, cosine, step or constant
    per: str = "epoch"  # lambda moves once an epoch, or once an iteration
    warmup: int = 0  # iterations over which lambda rises to its value
    stop: float = 1.0  # share of the training after which lambda is 0; 1 is never
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)  # "step": shares of the training at which ...
    gamma: float = 0.1  # ... lambda is multiplied by this

    def __post_init__(self) -> None:
        _one_of(self, "kind", SCHEDULES)
        _one_of(self, "per", STEP_SIZES)
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int):
            raise TypeError(f"ScheduleSettings.warmup must be an int (iterations), got {self.warmup!r}")
        _number(self, "warmup", 0)
        _number(self, "stop", 0.0, 1.0, open_low=True)
        _number(self, "gamma", 0.0, 1.0)
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if list(self.milestones) != sorted(self.milestones) or any(not 0 < m < 1 for m in self.milestones):
            raise ValueError(
                f"ScheduleSettings.milestones is {self.milestones!r}; they are shares of the training, "
                "rising, each between 0 and 1"
            )


@dataclass(frozen=True)
class DistillSettings:
    """Weights, gates and losses of a distillation. The defaults are the method's where it states one."""

    # Weight of each term; 0 leaves it out.
    feature: float = 1.0  # weight of the pooled features' term
    classification: float = 1.0  # weight of the class logits' term
    regression: float = 1.0  # weight of the box deltas' term
    gaussian: float = 0.0  # weight of the whole maps' term, under a Gaussian at every object

    # Which regions both models are asked about, and which of them transfer.
    sharing: str = "student"  # whose proposals: student, teacher or both
    feature_gate: str = "either"  # all, foreground, classification, regression or either of these two gates
    classification_gate: str = "teacher_better"  # all, foreground, or teacher_better at the true class
    regression_gate: str = "vs_proposal"  # foreground, vs_proposal or vs_student: whose box the teacher's must beat

    temperature: float = 1.0  # of the class term's softmax
    beta: float = 1 / 9  # smooth-L1 threshold of the deltas, and of feature_loss="smooth_l1"
    feature_loss: str = "squared"  # squared, absolute or smooth_l1
    bin_weight: str = "uniform"  # uniform, or gaussian: bins near the object's centre count more
    sigma_squared: float = 2.0  # width of the Gaussian mask, in half box sizes

    path: str = "auto"  # pooled: what the heads pooled anyway; pyramid: pool again, alike; auto: pooled if possible
    teacher_input_ratio: float | None = None  # teacher's input size / student's; None: from the models
    teacher_bf16: bool = False  # the teacher's trunk under bfloat16 autocast, whatever the student runs under
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)  # of the weight of all terms
    check_finite: bool = True  # stop at a NaN or infinite term; on a GPU in the next step, so that nothing waits

    def __post_init__(self) -> None:
        for key in ("feature", "classification", "regression", "gaussian", "beta"):
            _number(self, key, 0.0)
        for key in ("temperature", "sigma_squared"):
            _number(self, key, 0.0, open_low=True)
        if self.teacher_input_ratio is not None:
            _number(self, "teacher_input_ratio", 0.0, open_low=True)
        _one_of(self, "sharing", SHARING)
        _one_of(self, "feature_gate", FEATURE_GATES)
        _one_of(self, "classification_gate", CLASSIFICATION_GATES)
        _one_of(self, "regression_gate", REGRESSION_GATES)
        _one_of(self, "feature_loss", FEATURE_LOSSES)
        _one_of(self, "bin_weight", BIN_WEIGHTS)
        _one_of(self, "path", PATHS)
        if not isinstance(self.schedule, ScheduleSettings):
            raise TypeError(f"DistillSettings.schedule must be a ScheduleSettings, got {self.schedule!r}")
        if not any(self.weights.values()):
            raise ValueError(
                f"DistillSettings: {', '.join(self.weights)} are all 0; for plain training use Distiller(enabled=False)"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every term by its name."""
        return {key: getattr(self, key) for key in ("feature", "classification", "regression", "gaussian")}

    @property
    def foreground_only(self) -> bool:
        """No term with weight looks at a background region."""
        return not (
            (self.feature and self.feature_gate == "all") or (self.classification and self.classification_gate == "all")
        )
