"""Ways in which a distillation could fail without a word, each turned into an error that says which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from tardkd import weights
from tardkd.detectors.base import Detector, HeadSettings

from .late import LateReader

SHOWN = 5

StateSource = Mapping[str, Any] | str | PathLike[str]


def load_teacher_weights(model: nn.Module, source: StateSource) -> None:
    """Load weights that must fit exactly.

    Args:
        model: the teacher, unwrapped.
        source: a state dict or the path of one, as torch.save or safetensors wrote it; a checkpoint that holds the
            state dict under ``"model"`` is read too. No code in the file is executed (``weights_only=True``).

    Raises:
        CheckpointError: the file cannot be read; see ``tardkd.weights``.
        ValueError: keys are missing, unexpected or of another shape; says how many matched and names the first. Or
            there is no state dict.
    """
    if isinstance(source, Mapping):
        content = weights.from_content(source, "the given state dict")
    else:
        content = weights.read(source)
    weights.fill(model, content, called="teacher weights")


def _first(keys: Sequence[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")


def check_separate(student: nn.Module, teacher: nn.Module) -> None:
    """The two models must have no parameter in common: to freeze the teacher would freeze the student."""
    frozen = {id(parameter) for parameter in teacher.parameters()}
    shared = [name for name, parameter in student.named_parameters() if id(parameter) in frozen]
    if shared:
        raise ValueError(
            f"student and teacher share {len(shared)} parameters ({_first(shared)}); the teacher is frozen, "
            "so give it parameters of its own (copy.deepcopy)"
        )


def check_conventions(student: HeadSettings, teacher: HeadSettings, *, named: bool) -> None:
    """Without names of the classes, both heads must have the background at the same place.

    Where the classes are ``named``, it may stand elsewhere: the class map puts the columns in order.
    """
    if student.background != teacher.background and not named:
        raise ValueError(
            f"the student's head has its background {student.background}, the teacher's {teacher.background}: "
            "student_classes and teacher_classes, the names in the order of the labels, would tell how they match"
        )


def check_sharing(sharing: str, student: Detector, teacher: Detector) -> None:
    """To share a teacher's proposals, it must have some, and the student a head that takes them."""
    for side, detector in (("student", student), ("teacher", teacher)):
        if sharing != "student" and not detector.two_stage:
            raise ValueError(
                f"sharing={sharing!r} needs two detectors with proposals; the {side}, a "
                f"{type(detector.model).__name__}, has none: sharing='student'"
            )


def check_bins(student: Detector, teacher: Detector) -> None:
    """To compare distributions, both heads must have some."""
    for side, detector in (("student", student), ("teacher", teacher)):
        if detector.head.bins is None:
            raise ValueError(
                f"the term 'distribution' needs two heads with distributions over the sides of a box; the {side}, a "
                f"{type(detector.model).__name__}, has none: distribution=0"
            )


def check_head_widths(student: tuple[int, int] | None, teacher: tuple[int, int] | None) -> None:
    """The numbers of columns of (logits, deltas) must agree, so that column k means the same class on both sides.

    None stands for a head whose widths only a pass can tell.
    """
    if student is None or teacher is None:
        return
    if student[0] != teacher[0]:
        raise ValueError(
            f"numbers of classes differ: the student's head has {student[0]} logits (background included), "
            f"the teacher's has {teacher[0]}; given student_classes and teacher_classes, they are matched by name"
        )
    if student[1] != teacher[1]:
        raise ValueError(
            f"box regression differs: student's deltas are {_delta_kind(student[1])}, "
            f"teacher's are {_delta_kind(teacher[1])}"
        )


def _delta_kind(width: int) -> str:
    return "class-agnostic (4 columns)" if width == 4 else f"class-specific ({width} columns)"


def check_gradients(terms: Mapping[str, Tensor], student_features: Sequence[Tensor]) -> None:
    """A term that counts must be able to teach the student; that an adapter learns is not enough.

    Args:
        terms: scalars () by the name of the term.
        student_features: L x (N, C, H_l, W_l).
    """
    if not torch.is_grad_enabled():
        return
    dead = [name for name, value in terms.items() if not value.requires_grad]
    if not any(level.requires_grad for level in student_features):
        dead += [name for name in ("feature", "gaussian") if name in terms and name not in dead]
    if dead:
        names = ", ".join(f"distill_{name}" for name in dead)
        raise RuntimeError(f"{names}: weight > 0, but no gradient reaches the student (is the part it trains frozen?)")


class FiniteCheck:
    """Raises FloatingPointError where a tensor has a NaN or infinity, and names it.

    For tensors on the CPU it does so at once. A GPU is not waited for: what is wrong there is raised by the next call,
    or by :meth:`settle`.
    """

    def __init__(self) -> None:
        self._reader = LateReader()

    def __call__(self, values: Mapping[str, Tensor]) -> None:
        """Check tensors of any shape, by the names that a message gives them."""
        self.settle()
        scalars = {name: value for name, value in values.items() if value.ndim == 0}
        others = {name: value for name, value in values.items() if value.ndim > 0}
        finite = []
        if scalars:  # all of them at once: a step has about ten
            finite.append(torch.stack([value.float() for value in scalars.values()]).isfinite())
        finite += [value.isfinite().all()[None] for value in others.values()]
        self._reader.read(torch.cat(finite), partial(_raise_not_finite, [*scalars, *others]))

    def settle(self) -> None:
        """Raise what the last call has not raised yet."""
        self._reader.settle()


def _raise_not_finite(names: list[str], finite: list[bool]) -> None:
    bad = [name for name, ok in zip(names, finite) if not ok]
    if bad:
        raise FloatingPointError(f"NaN or infinity in {', '.join(bad)}")
