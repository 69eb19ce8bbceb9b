"""Which of a teacher's classes teach which of the student's, where the two label sets differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from tardkd.detectors.base import HeadOutputs, HeadSettings, Regions
from tardkd.ops.spec import Background, background_label, class_count, first_class_label

from . import checks
from .conventions import common_coding, common_widths


@dataclass(frozen=True)
class ClassMap:
    """Pairs of a student's and a teacher's class: only these are transferred.

    A region of a class without a partner is left out; a background region stays. On the others both heads are compared
    as if the pairs were all the classes there are: softmax logits on the columns of the background and the pairs, so
    that the loss and the gates see the probabilities *given* that a region shows one of these classes or nothing (our
    choice: what one side thinks of a class that the other does not know has no counterpart there); sigmoid logits and
    class-specific deltas on the columns of the pairs. Where a side's columns are all wanted, in order, they are taken
    as they are.

    The identity map leaves everything as it is, at no cost. ``ClassMap()`` is the identity where nobody has named the
    classes: both sides are taken to have the same ones in the same order.
    """

    student: tuple[str, ...] = ()  # all names, in the order of the labels; empty where they are unknown
    teacher: tuple[str, ...] = ()  # the same of the teacher
    pairs: tuple[
        tuple[int, int], ...
    ] = ()  # places among the student's and the teacher's names, in the student's order

    @property
    def is_named(self) -> bool:
        """Whether the names of the classes are known."""
        return bool(self.student)

    @cached_property
    def is_identity(self) -> bool:
        """Whether both sides have the same classes in the same order, and all of them are transferred."""
        same = tuple((place, place) for place in range(len(self.student)))
        return self.pairs == same and len(self.teacher) == len(self.student)

    @property
    def is_partial(self) -> bool:
        """Whether some class of the student has no partner."""
        return len(self.pairs) < len(self.student)

    @property
    def taught(self) -> list[str]:
        """The student's names of the pairs."""
        return [self.student[student_place] for student_place, _ in self.pairs]

    def describe(self) -> str:
        """The pairs in words, as in "cat, person (its 'pedestrian')"."""
        names = [
            (self.student[student_place], self.teacher[teacher_place]) for student_place, teacher_place in self.pairs
        ]
        return ", ".join(
            student_name if student_name == teacher_name else f"{student_name} (its {teacher_name!r})"
            for student_name, teacher_name in names
        )

    # --- labels

    def labels(self, labels: Tensor, background: Background) -> Tensor:
        """Labels of the student, of any shape, as labels of the pairs; -1 where there is none.

        Args:
            background: where both have it.
        """
        if not self.is_partial:
            return labels
        places = tuple(student_place for student_place, _ in self.pairs)
        table = _label_table(places, len(self.student), background, labels.device)
        return table[labels.clamp(-1, len(self.student) + 1)]

    def to_student(self, labels: Tensor) -> Tensor:
        """Labels 0..P of the pairs, of any shape, as the student's 0..K, where 0 is the background."""
        if not self.is_partial:
            return labels
        return labels.new_tensor([0, *(student_place + 1 for student_place, _ in self.pairs)])[labels]

    def from_teacher(self, labels: Tensor) -> Tensor:
        """Labels 1.. of the teacher, of any shape, as the student's 1..K; 0 where there is no partner."""
        if self.is_identity:
            return labels
        table = [0] * (len(self.teacher) + 1)
        for student_place, teacher_place in self.pairs:
            table[teacher_place + 1] = student_place + 1
        return labels.new_tensor(table)[labels]

    def detections(self, detections: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's detections on an image that are of the pairs, under the student's labels.

        Args:
            detections: "labels" (D,) int64 and other tensors of D rows.
        """
        if self.is_identity:
            return dict(detections)
        labels = self.from_teacher(detections["labels"])
        return {key: value[labels > 0] for key, value in {**detections, "labels": labels}.items()}

    # --- regions and what the heads say about them

    def student_regions(self, regions: Regions, head: HeadSettings) -> Regions:
        """The background regions and those of the pairs, with labels and outputs of the pairs alone."""
        if self.is_identity:
            return regions
        if self.is_partial:
            regions = regions.select(self.labels(regions.labels, head.background) >= 0)
        return replace(
            regions,
            labels=self.labels(regions.labels, head.background),
            head=self.student_outputs(regions.head, head),
        )

    def student_outputs(self, outputs: HeadOutputs, head: HeadSettings) -> HeadOutputs:
        """What the student's head says of the pairs alone."""
        if self.is_identity:
            return outputs
        places = tuple(student_place for student_place, _ in self.pairs)
        return _of_classes(outputs, "student", self.student, places, head, head.background)

    def teacher_outputs(self, outputs: HeadOutputs, head: HeadSettings, background: Background) -> HeadOutputs:
        """What the teacher's head says of the pairs alone.

        Args:
            background: where the student has it; the result has it there, too.
        """
        if self.is_identity and head.background == background:
            return outputs
        places = tuple(teacher_place for _, teacher_place in self.pairs)
        return _of_classes(outputs, "teacher", self.teacher, places, head, background)

    def teacher_places(self, regions: Regions, head: HeadSettings) -> Tensor:
        """The class of each region's object as the teacher counts its own: (R,) int64 from 0, -1 for the background.

        Args:
            regions: with labels and outputs of the pairs alone, as :meth:`student_regions` makes them.
            head: the student's.
        """
        places = regions.labels - first_class_label(head.background)
        places = torch.where(regions.foreground(head), places, -1)
        if self.is_identity or not self.is_named:
            return places
        return _place_table(tuple(teacher_place for _, teacher_place in self.pairs), places.device)[places]

    def check_widths(self, student: HeadSettings, teacher: HeadSettings) -> None:
        """Raises ValueError where a head does not fit its names, or one head the other."""
        if student.widths is None or teacher.widths is None:
            return
        student_outputs, teacher_outputs = (
            HeadOutputs(torch.empty(0, logits), torch.empty(0, boxes))
            for logits, boxes in (student.widths, teacher.widths)
        )
        coding = common_coding(student, teacher)
        own = self.student_outputs(student_outputs, student).widths
        theirs = self.teacher_outputs(teacher_outputs, teacher, student.background).widths
        checks.check_head_widths(
            common_widths(own, student, student, coding), common_widths(theirs, teacher, student, coding)
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
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"the {side} has several classes called {', '.join(repeated)}: they cannot be told apart")
        given = class_map if side == "teacher" else [name for name in class_map.values() if name is not None]
        unknown = [repr(name) for name in given if name not in names]
        if unknown:
            raise ValueError(f"class map: {', '.join(unknown)} is no class of the {side}, which has {', '.join(names)}")

    pupils: dict[str, str | None] = {**{name: name for name in teacher if name in student}, **class_map}
    partners: dict[str, str] = {}  # student's name: teacher's
    for teacher_name, student_name in pupils.items():
        if student_name is None:
            continue
        if student_name in partners:
            raise ValueError(
                f"the teacher's classes {partners[student_name]!r} and {teacher_name!r} would both teach "
                f"{student_name!r}; map all but one of them to null"
            )
        partners[student_name] = teacher_name
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


def _of_classes(
    outputs: HeadOutputs,
    side: str,
    names: tuple[str, ...],
    places: tuple[int, ...],
    head: HeadSettings,
    background: Background,
) -> HeadOutputs:
    """The columns of the classes at some ``places`` among all ``names``, with the background at ``background``."""
    count, (logits_width, boxes_width) = len(names), outputs.widths
    if class_count(logits_width, head.activation) != count or boxes_width not in (4, 4 * count, 4 * (count + 1)):
        raise ValueError(
            f"the {side}'s head, with {logits_width} logits and {boxes_width} deltas a region, is not one of its "
            f"{count} classes ({', '.join(names)})"
        )

    def take(values: Tensor, size: int) -> Tensor:
        columns = _columns(places, count, head.background, background, values.shape[1], size, values.device)
        return values if columns is None else values.index_select(1, columns)

    boxes = outputs.boxes if boxes_width == 4 else take(outputs.boxes, 4)
    return replace(outputs, logits=take(outputs.logits, 1), boxes=boxes)


# Every step asks for the same few of these.


@lru_cache
def _columns(
    places: tuple[int, ...],
    count: int,
    own: Background,
    wanted: Background,
    width: int,
    size: int,
    device: torch.device,
) -> Tensor | None:
    """(columns,) int64: where some of ``count`` classes stand in ``width`` columns; None: all of them, in order.

    Each class has ``size`` columns. The background, if it has some too, comes along: from where the head has it
    (``own``) to where it is ``wanted``.
    """
    has_background = width == size * (count + 1)
    first = first_class_label(own) if has_background else 0
    blocks = [first + place for place in places]
    if has_background:
        blocks.insert(background_label(wanted, len(places)), background_label(own, count))
    if blocks == list(range(width // size)):
        return None
    return torch.tensor([size * block + i for block in blocks for i in range(size)], device=device)


@lru_cache
def _label_table(places: tuple[int, ...], count: int, background: Background, device: torch.device) -> Tensor:
    """(count + 2,) int64: new label by the old one; the last is that of labels outside [0, count], also as index -1."""
    first = first_class_label(background)
    table = [-1] * (count + 2)
    table[background_label(background, count)] = background_label(background, len(places))
    for new, place in enumerate(places):
        table[first + place] = first + new
    return torch.tensor(table, device=device)


@lru_cache
def _place_table(places: tuple[int, ...], device: torch.device) -> Tensor:
    """(P + 1,) int64: the teacher's place by the pair's; the last, which index -1 finds, is that of no object."""
    return torch.tensor([*places, -1], device=device)
