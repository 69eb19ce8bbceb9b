"""Which of a teacher's classes teach which of the student's, where the two label sets differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from tardkd.detectors.base import HeadOutputs, HeadSettings, Regions

from . import checks


@dataclass(frozen=True)
class ClassMap:
    """Pairs of a student's and a teacher's class: only these are transferred.

    A region of a class without a partner is left out; a background region stays. On the others both heads are compared
    as if the pairs were all the classes there are: softmax logits on the columns of the background and the pairs, so
    that the loss and the gates see the probabilities *given* that a region shows one of these classes or nothing (our
    choice: what one side thinks of a class that the other does not know has no counterpart there); sigmoid logits and
    class-specific deltas on the columns of the pairs. Where a side's columns are all wanted, in order, they are taken
    as they are.
    """

    student: tuple[str, ...]  # all names, in the order of the labels
    teacher: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]  # places among the student's and the teacher's names, in the student's order

    @property
    def is_identity(self) -> bool:
        same = tuple((place, place) for place in range(len(self.student)))
        return self.pairs == same and len(self.teacher) == len(self.student)

    @property
    def is_partial(self) -> bool:
        """Some class of the student's has no partner."""
        return len(self.pairs) < len(self.student)

    @property
    def taught(self) -> list[str]:
        """The student's names of the pairs."""
        return [self.student[ours] for ours, _ in self.pairs]

    def describe(self) -> str:
        """As in "cat, person (its 'pedestrian')"."""
        names = [(self.student[ours], self.teacher[theirs]) for ours, theirs in self.pairs]
        return ", ".join(ours if ours == theirs else f"{ours} (its {theirs!r})" for ours, theirs in names)

    def labels(self, labels: Tensor, background: str) -> Tensor:
        """Labels of the student as labels of the pairs; -1 where there is none. ``background``: "first" or "last"."""
        if not self.is_partial:
            return labels
        table = _label_table(tuple(ours for ours, _ in self.pairs), len(self.student), background, labels.device)
        return table[labels.clamp(-1, len(self.student) + 1)]

    def to_student(self, labels: Tensor) -> Tensor:
        """Labels 0..P of the pairs as the student's 0..K, where 0 is the background."""
        return labels.new_tensor([0, *(ours + 1 for ours, _ in self.pairs)])[labels]

    def from_teacher(self, labels: Tensor) -> Tensor:
        """Labels 1.. of the teacher as the student's 1..K; 0 where there is no partner."""
        table = [0] * (len(self.teacher) + 1)
        for ours, theirs in self.pairs:
            table[theirs + 1] = ours + 1
        return labels.new_tensor(table)[labels]

    def detections(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a teacher found on an image, of the pairs alone and under the student's labels."""
        labels = self.from_teacher(found["labels"])
        return {key: value[labels > 0] for key, value in {**found, "labels": labels}.items()}

    def student_regions(self, regions: Regions, head: HeadSettings) -> Regions:
        """The background regions and those of the pairs, with labels and outputs of the pairs alone."""
        if self.is_partial:
            regions = regions.select(self.labels(regions.labels, head.background) >= 0)
        return replace(
            regions,
            labels=self.labels(regions.labels, head.background),
            head=self.student_outputs(regions.head, head),
        )

    def student_outputs(self, outputs: HeadOutputs, head: HeadSettings) -> HeadOutputs:
        places = tuple(ours for ours, _ in self.pairs)
        return _restricted(outputs, "student", self.student, places, head, head.background)

    def teacher_outputs(self, outputs: HeadOutputs, head: HeadSettings, background: str) -> HeadOutputs:
        """``background``: where the student has it; the result has it there, too."""
        places = tuple(theirs for _, theirs in self.pairs)
        return _restricted(outputs, "teacher", self.teacher, places, head, background)

    def check_widths(self, student: HeadSettings, teacher: HeadSettings) -> None:
        """Raises ValueError where a head does not fit its names, or one head the other."""
        if student.widths is None or teacher.widths is None:
            return
        ours, theirs = (
            HeadOutputs(torch.empty(0, logits), torch.empty(0, deltas), torch.empty(0))
            for logits, deltas in (student.widths, teacher.widths)
        )
        checks.check_head_widths(
            self.student_outputs(ours, student).widths,
            self.teacher_outputs(theirs, teacher, student.background).widths,
        )


def match_classes(
    student: Sequence[str], teacher: Sequence[str], class_map: Mapping[str, str | None] | None = None
) -> ClassMap:
    """Classes of the same name are a pair, but ``class_map`` (teacher's: student's, or None for no pair) comes first.

    Raises:
        ValueError: ``class_map`` names an unknown class, two of the teacher's classes would teach one of the
            student's, no pair is left, or a name stands twice in one of two lists that are not the same.
    """
    student, teacher, class_map = tuple(student), tuple(teacher), class_map or {}
    if student == teacher and not class_map:
        return ClassMap(student, teacher, tuple((place, place) for place in range(len(student))))
    for side, names in (("student", student), ("teacher", teacher)):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the {side} has several classes called {', '.join(twice)}: they cannot be told apart")
        given = class_map if side == "teacher" else [name for name in class_map.values() if name is not None]
        unknown = [repr(name) for name in given if name not in names]
        if unknown:
            raise ValueError(f"class map: {', '.join(unknown)} is no class of the {side}, which has {', '.join(names)}")

    goals = {**{name: name for name in teacher if name in student}, **class_map}
    partners: dict[str, str] = {}
    for theirs, ours in goals.items():
        if ours is not None and ours in partners:
            raise ValueError(
                f"the teacher's classes {partners[ours]!r} and {theirs!r} would both teach {ours!r}; "
                "map all but one of them to null"
            )
        if ours is not None:
            partners[ours] = theirs
    if not partners:
        raise ValueError(
            f"no class of the teacher teaches one of the student's; student: {', '.join(student)}; "
            f"teacher: {', '.join(teacher)}; a class map can pair them"
        )
    return ClassMap(
        student,
        teacher,
        tuple((place, teacher.index(partners[name])) for place, name in enumerate(student) if name in partners),
    )


def _restricted(
    outputs: HeadOutputs,
    side: str,
    names: tuple[str, ...],
    places: tuple[int, ...],
    head: HeadSettings,
    background: str,
) -> HeadOutputs:
    count, (logits, deltas) = len(names), outputs.widths
    if logits != count + (head.activation == "softmax") or deltas not in (4, 4 * count, 4 * (count + 1)):
        raise ValueError(
            f"the {side}'s head, with {logits} logits and {deltas} deltas a region, is not one of its "
            f"{count} classes ({', '.join(names)})"
        )

    def take(values: Tensor, size: int) -> Tensor:
        columns = _columns(places, count, head.background, background, values.shape[1], size, values.device)
        return values if columns is None else values.index_select(1, columns)

    agnostic = deltas == 4
    return HeadOutputs(take(outputs.logits, 1), outputs.deltas if agnostic else take(outputs.deltas, 4), outputs.pooled)


# Every step asks for the same few of these.


@lru_cache
def _columns(
    places: tuple[int, ...], count: int, own: str, wanted: str, width: int, size: int, device: torch.device
) -> Tensor | None:
    """Where some of ``count`` classes stand in ``width`` columns, ``size`` a class; None: all of them, in order.

    The background, if it has columns, comes along: from where the head has it (``own``) to where it is ``wanted``.
    """
    has_background = width == size * (count + 1)
    blocks = [place + (has_background and own == "first") for place in places]
    if has_background:
        background = 0 if own == "first" else count
        blocks = [background, *blocks] if wanted == "first" else [*blocks, background]
    if blocks == list(range(width // size)):
        return None
    return torch.tensor([size * block + i for block in blocks for i in range(size)], device=device)


@lru_cache
def _label_table(places: tuple[int, ...], count: int, background: str, device: torch.device) -> Tensor:
    """(count + 2,) new label by the old one; the last is that of labels outside [0, count], also as index -1."""
    first = background == "first"
    table = [-1] * (count + 2)
    table[0 if first else count] = 0 if first else len(places)
    for new, place in enumerate(places):
        table[place + first] = new + first
    return torch.tensor(table, device=device)
