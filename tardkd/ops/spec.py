"""What can be chosen about an op: the choices by name, the settings of RoIAlign, those of the losses.

Each set of settings is stated here once, with its defaults, its checks and the order in which it travels through
torch's dispatcher. Everything else reads it by name: the public functions, the kernels, the reference, the distiller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

from torch import Tensor

FeatureLoss = Literal["squared", "absolute", "smooth_l1"]
BinWeight = Literal["uniform", "gaussian"]
FeatureGate = Literal["all", "foreground", "classification", "regression", "either"]
ClassificationGate = Literal["all", "foreground", "teacher_better"]
RegressionGate = Literal["foreground", "vs_proposal", "vs_student"]
Background = Literal["first", "last"]
Activation = Literal["softmax", "sigmoid"]
Reduction = Literal["mean", "sum", "none"]


# --- the background ---------------------------------------------------------------------------------------------------
# Labels and softmax columns count alike: the background is 0 and the classes follow ("first", torchvision), or the
# classes come first and the background is K ("last", Detectron2 and MMDetection).


def background_label(background: Background, num_classes: int) -> int:
    """The label of a region without an object; also its column among softmax logits."""
    return 0 if background == "first" else num_classes


def first_class_label(background: Background) -> int:
    """The label of the first of the K classes, which sigmoid logits have in column 0."""
    return 1 if background == "first" else 0


def is_foreground(labels: Tensor, background: Background, num_classes: int) -> Tensor:
    """(R,) bool: which of the ``labels`` (R,) are not the background's."""
    return labels != background_label(background, num_classes)


def class_count(logits_width: int, activation: Activation) -> int:
    """K, the number of foreground classes, of logits with ``logits_width`` columns."""
    return logits_width - 1 if activation == "softmax" else logits_width


# --- settings ---------------------------------------------------------------------------------------------------------


class RoIAlignSpec(NamedTuple):
    """How a region is pooled from a pyramid; names, meaning and defaults are torchvision's."""

    output_size: tuple[int, int] = (7, 7)  # bins (height, width)
    sampling_ratio: int = 2  # samples a bin and axis; 0 or less: adaptive
    aligned: bool = False  # shift regions by half a pixel
    canonical_scale: float = 224.0  # a region of this many pixels a side ...
    canonical_level: int = 4  # ... belongs to this level

    @classmethod
    def checked(
        cls,
        output_size: int | Sequence[int],
        sampling_ratio: int,
        aligned: bool,
        canonical_scale: float,
        canonical_level: int,
    ) -> RoIAlignSpec:
        """The settings as a user may write them, ``output_size`` also as one int.

        Raises:
            ValueError, TypeError: a setting is out of range or of another type; names it.
        """
        if not canonical_scale > 0:
            raise ValueError(f"canonical_scale must be positive, got {canonical_scale}")
        if not isinstance(canonical_level, int):
            raise TypeError(f"canonical_level must be an int, got {canonical_level!r}")
        return cls(output_pair(output_size), sampling_ratio, aligned, float(canonical_scale), canonical_level)


def output_pair(output_size: int | Sequence[int]) -> tuple[int, int]:
    """``output_size`` as (height, width) in bins."""
    pair = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"output_size must be a positive int or (height, width), got {output_size!r}")
    return pair


class LossSpec(NamedTuple):
    """Gates and losses of the shared regions: see :func:`tardkd.ops.region_distill_loss`."""

    feature_loss: FeatureLoss = "squared"
    bin_weight: BinWeight = "uniform"
    feature_gate: FeatureGate = "either"
    classification_gate: ClassificationGate = "teacher_better"
    regression_gate: RegressionGate = "vs_proposal"
    temperature: float = 1.0  # of the classification loss
    beta: float = 1 / 9  # smooth-L1 threshold
    box_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0)  # of the box coder, four: dx, dy, dw, dh
    background: Background = "first"
    activation: Activation = "softmax"
    reduction: Reduction = "mean"

    def checked(self) -> LossSpec:
        """The same with its numbers as floats.

        Raises:
            ValueError: a setting is out of range or no known choice; names it.
        """
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not self.beta >= 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")
        if len(self.box_weights) != 4 or not min(self.box_weights) > 0:
            raise ValueError(
                f"box_weights must be four positive numbers (wx, wy, ww, wh), got {tuple(self.box_weights)}"
            )
        x, y, w, h = self.box_weights
        return LossSpec(
            *self[:5],
            float(self.temperature),
            float(self.beta),
            (float(x), float(y), float(w), float(h)),
            *self[8:],
        )


# What may be chosen, by the name of the setting.
CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(hint) for name, hint in get_type_hints(LossSpec).items() if get_origin(hint) is Literal
}
