"""What can be chosen about an op: the choices by name, the settings of RoIAlign, those of the losses.

Each set of settings is stated here once, with its defaults, its checks and the order in which it travels through
torch's dispatcher. Everything else reads it by name: the public functions, the kernels, the reference, the distiller.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from torch import Tensor

FeatureLoss = Literal["squared", "absolute", "smooth_l1"]
BinWeight = Literal["uniform", "gaussian"]
FeatureGate = Literal["all", "foreground", "classification", "regression", "either"]
ClassificationGate = Literal["all", "foreground", "teacher_better"]
RegressionGate = Literal["foreground", "vs_proposal", "vs_student"]
Background = Literal["first", "last"]
Activation = Literal["softmax", "sigmoid"]
Reduction = Literal["mean", "sum", "none"]
BoxCoding = Literal["deltas", "boxes"]
FeatureNorm = Literal["none", "channel"]


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


# --- numbers ----------------------------------------------------------------------------------------------------------

MAX_LEVELS = 8  # of a pyramid, as kMaxLevels in csrc/core/common.h
MAX_BINS = 4096  # a side of a pooled region
MAX_SAMPLES = 1024  # a bin and axis
NORM_EPSILON = 1e-6  # added to the variance of a channel that is standardised
_INT32 = 2**31


def integer(name: str, value: Any, *, low: int = -_INT32, high: int = _INT32 - 1) -> int:
    """``value`` as an int in [low, high]; numpy's integers and tensors of one integer are ints too.

    Raises:
        TypeError: it is none. ValueError: it is out of range.
    """
    if not isinstance(value, int):
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name} must be an int, got {value!r}") from None
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    return value


def positive(name: str, value: Any) -> float:
    """``value`` as a float in (0, infinity).

    Raises:
        TypeError: it is no number. ValueError: it is out of range.
    """
    if type(value) is float and 0 < value < math.inf:  # as nearly always
        return value
    result = _finite(name, value)
    if result <= 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return result


def not_negative(name: str, value: Any) -> float:
    """``value`` as a float in [0, infinity); raises as :func:`positive`."""
    result = _finite(name, value)
    if result < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    return result


def _finite(name: str, value: Any) -> float:
    try:
        result = float("" if isinstance(value, str) else value)  # a string is none, also one that float() would read
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not -math.inf < result < math.inf:
        raise ValueError(f"{name} must be finite, got {result}")
    return result


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
        return cls(
            output_pair(output_size),
            integer("sampling_ratio", sampling_ratio, high=MAX_SAMPLES),
            bool(aligned),
            positive("canonical_scale", canonical_scale),
            integer("canonical_level", canonical_level),
        )


def output_pair(output_size: int | Sequence[int]) -> tuple[int, int]:
    """``output_size`` as (height, width) in bins."""
    if type(output_size) is int and 0 < output_size <= MAX_BINS:  # as nearly always
        return output_size, output_size
    given = output_size if isinstance(output_size, Sequence) else (output_size, output_size)
    pair = tuple(integer("output_size", bins, high=MAX_BINS) for bins in given)
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
    box_coding: BoxCoding = "deltas"  # what the heads say of a region's box
    feature_norm: FeatureNorm = "none"

    def checked(self) -> LossSpec:
        """The same with its numbers as floats.

        Raises:
            ValueError, TypeError: a setting is out of range, of another type or no known choice; names it.
        """
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        weights = self.box_weights
        if not isinstance(weights, (tuple, list, Sequence)):
            raise TypeError(f"box_weights must be four positive numbers (wx, wy, ww, wh), got {weights!r}")
        # The smallest and the largest of numbers with a NaN may be any, but not their sum.
        if len(weights) != 4 or not (min(weights) > 0 and sum(weights) < math.inf):
            raise ValueError(f"box_weights must be four positive numbers (wx, wy, ww, wh), got {tuple(weights)}")
        return LossSpec(
            *self[:5],
            positive("temperature", self.temperature),
            not_negative("beta", self.beta),
            tuple(map(float, weights)),
            *self[8:],
        )


# What may be chosen, by the name of the setting.
CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(hint) for name, hint in get_type_hints(LossSpec).items() if get_origin(hint) is Literal
}
