"""Teachers as the user describes them, and how each is paired with the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tardkd.detectors import Detector

from .classes import ClassMap, match_classes
from .settings import DistillSettings
from .teachers import FrozenTeacher


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained detector, and what is known of its classes.

    Raises:
        TypeError: a field is of another type; names it.
    """

    model: nn.Module | Detector  # a detector of a family that tardkd.detectors knows, or one in the terms of its family
    classes: Sequence[str] | None = None  # names in the order of the labels, no background; None: the student's
    class_map: Mapping[str, str | None] | None = None  # its class: the student's, or None for "not transferred"
    name: str | None = None  # what messages call it; None: "the teacher", or of several "teacher 0" and so on

    def __post_init__(self) -> None:
        if not isinstance(self.model, (nn.Module, Detector)):
            raise TypeError(f"a teacher must be a detector (an nn.Module), got {type(self.model).__name__}")
        if self.classes is not None and (isinstance(self.classes, str) or not isinstance(self.classes, Sequence)):
            raise TypeError(f"a teacher's classes must be a list of names, got {self.classes!r}")
        if self.class_map is not None and not isinstance(self.class_map, Mapping):
            raise TypeError(f"a teacher's class_map must map its class names to the student's, got {self.class_map!r}")


OneTeacher = nn.Module | Detector | Teacher
TeacherArgument = OneTeacher | Sequence[OneTeacher] | None
ClassesArgument = Sequence[str] | Sequence[Sequence[str] | None] | None
ClassMapArgument = Mapping[str, str | None] | Sequence[Mapping[str, str | None] | None] | None


def as_teachers(
    teacher: TeacherArgument, teacher_classes: ClassesArgument = None, class_map: ClassMapArgument = None
) -> list[Teacher]:
    """What a :class:`tardkd.distill.Distiller` is given, one model or several, as a list of teachers.

    Args:
        teacher: a model, a Teacher, or a list of these; None is no teacher.
        teacher_classes, class_map: what a plain model does not say itself; of a list of models, lists of as many.

    Raises:
        TypeError: something is no teacher; says what it is.
        ValueError: the lists differ in length, or describe what a Teacher describes itself.
    """
    if teacher is None:
        return []
    if isinstance(teacher, (nn.Module, Detector, Teacher)):
        return [_as_teacher(teacher, teacher_classes, class_map)]
    if not isinstance(teacher, Sequence):
        raise TypeError(
            f"teacher must be a detector (an nn.Module), a Teacher or a list of these, got {type(teacher).__name__}"
        )
    count = len(teacher)
    all_classes, all_maps = teacher_classes or [None] * count, class_map or [None] * count
    if not len(all_classes) == len(all_maps) == count:
        raise ValueError(
            f"{count} teachers need as many teacher_classes and class_maps, got {len(all_classes)} and {len(all_maps)}"
        )
    return [_as_teacher(*described) for described in zip(teacher, all_classes, all_maps)]


def _as_teacher(teacher: OneTeacher, classes: Any, class_map: Any) -> Teacher:
    """One teacher; whether what is said of its classes has the right types is seen by :class:`Teacher`."""
    if not isinstance(teacher, Teacher):
        return Teacher(teacher, classes, class_map)
    if classes is not None or class_map is not None:
        raise ValueError(
            "teacher_classes and class_map are for plain models; a Teacher has its own: "
            "Teacher(model, classes=..., class_map=...)"
        )
    return teacher


def pair_teachers(
    student: Detector,
    teachers: Sequence[Teacher],
    settings: DistillSettings,
    student_classes: Sequence[str] | None,
) -> list[FrozenTeacher]:
    """Freeze every teacher and give it its share of the student's classes.

    Raises:
        ValueError: a teacher cannot be paired with the student, or two teach the same class; says which.
    """
    if len(teachers) > 1 and (student_classes is None or any(teacher.classes is None for teacher in teachers)):
        raise ValueError("several teachers share the student's classes: student_classes and all teacher_classes needed")
    paired = []
    for number, teacher in enumerate(teachers):
        name, adapter_key = "the teacher", "feature"
        if len(teachers) > 1:
            name, adapter_key = f"teacher {number}", f"feature_{number}"
        if teacher.name is not None:
            name = teacher.name
        try:
            classes = _match(student_classes, teacher)
            paired.append(FrozenTeacher(teacher.model, student, settings, classes, name, adapter_key))
        except ValueError as error:
            if len(teachers) == 1 and teacher.name is None:
                raise
            raise ValueError(f"{name}: {error}") from error
    if len(paired) > 1:
        _check_names(paired)
        _check_disjoint(paired)
    return paired


def _match(student_classes: Sequence[str] | None, teacher: Teacher) -> ClassMap:
    """The teacher's classes and the student's; without the names of both they are taken to be the same."""
    if student_classes is not None and teacher.classes is not None:
        return match_classes(student_classes, teacher.classes, teacher.class_map)
    if teacher.class_map:
        raise ValueError("a class map needs the names of both sides: student_classes and teacher_classes")
    return ClassMap()


def _check_names(teachers: Sequence[FrozenTeacher]) -> None:
    """Messages must tell the teachers apart."""
    names = [teacher.name for teacher in teachers]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"several teachers are called {', '.join(repeated)}: give each a name of its own")


def _check_disjoint(teachers: Sequence[FrozenTeacher]) -> None:
    """No class may have two teachers."""
    taught_by: dict[str, list[str]] = {}
    for teacher in teachers:
        for class_name in teacher.classes.taught:
            taught_by.setdefault(class_name, []).append(teacher.name)
    clashes = [f"{name} ({' and '.join(by)})" for name, by in taught_by.items() if len(by) > 1]
    if clashes:
        raise ValueError(
            f"every class has one teacher at most, but several teach {', '.join(clashes)}; "
            "map such a class to null in all but one class map"
        )
