"""How teachers are described to the distiller, and what each way of it comes to."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from detectors.tiny import tiny_detector
from torch import nn

from tardkd.distill import Distiller, DistillSettings, Teacher
from tardkd.distill.pairing import as_teachers

from .test_classes import NAMES, OPEN, run, with_classes


def described(teacher: Any, **arguments: Any) -> Distiller:
    """A distiller with a student of the classes ``NAMES``."""
    return Distiller(
        tiny_detector(),
        teacher,
        DistillSettings(**OPEN, balance="none", feature_norm="none"),
        student_classes=NAMES,
        **arguments,
    )


def assert_same(a: Distiller, b: Distiller) -> None:
    assert a.describe() == b.describe()
    losses, expected = run(a), run(b)
    assert losses == expected and all(value > 0 for value in losses.values())


# --- a Teacher says what the keyword arguments say --------------------------------------------------------------------


def test_one_teacher() -> None:
    model = with_classes(tiny_detector(seed=1), [3, 1])
    teacher = Teacher(model, classes=["x", "a"], class_map={"x": "c"})
    keywords = described(model, teacher_classes=["x", "a"], class_map={"x": "c"})
    for way in (teacher, [teacher]):
        assert_same(described(way), keywords)
    assert keywords.describe() == ["the teacher teaches a, c (its 'x')", "no teacher for b"]


def test_several_teachers() -> None:
    models = [tiny_detector(seed=1), with_classes(tiny_detector(seed=2), [2])]
    first, second = {"b": None}, None
    keywords = described(models, teacher_classes=[NAMES, ["b"]], class_map=[first, second])
    teachers = [Teacher(models[0], NAMES, first), Teacher(models[1], ["b"])]
    assert_same(described(teachers), keywords)
    assert_same(described(tuple(teachers)), keywords)
    mixed = described([teachers[0], models[1]], teacher_classes=[None, ["b"]])
    assert_same(mixed, keywords)
    assert mixed.teachers == models


def test_a_teacher_without_names_has_the_students_classes() -> None:
    model = tiny_detector(seed=1)
    assert_same(described(Teacher(model)), described(model))
    assert described(Teacher(model)).describe() == []


def test_a_teacher_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Teacher(tiny_detector()).classes = ["a"]


def test_disabled_takes_any_teacher() -> None:
    model = tiny_detector(seed=1)
    distiller = Distiller(tiny_detector(), Teacher(model), enabled=False)
    assert distiller.teachers == [] and model.training and all(p.requires_grad for p in model.parameters())


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_are_used_in_messages() -> None:
    model = with_classes(tiny_detector(seed=1), [1, 2])
    broken = with_classes(tiny_detector(seed=2), [3])
    with torch.no_grad():
        broken.roi_heads.box_predictor.cls_score.bias[1] = torch.nan
    distiller = described([Teacher(model, ["a", "b"], name="pets"), Teacher(broken, ["c"], name="cattle")])
    assert distiller.describe() == ["pets teaches a, b", "cattle teaches c"]
    with pytest.raises(FloatingPointError, match="cattle's logits"):
        run(distiller)


def test_names_do_not_change_checkpoints() -> None:
    models = [with_classes(tiny_detector(seed=1, channels=12), classes) for classes in ([1, 2], [3])]
    distiller = described([Teacher(models[0], ["a", "b"], name="pets"), Teacher(models[1], ["c"])])
    assert list(distiller.task_state()["adapters"]) == [
        f"feature_{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    ]
    assert distiller.describe()[1] == "teacher 1 teaches c"


def test_a_name_stands_before_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="^pets: no class of the teacher teaches"):
        described(Teacher(tiny_detector(seed=1), ["x", "y", "z"], name="pets"))


def test_two_of_one_name() -> None:
    model = with_classes(tiny_detector(seed=1), [1])
    other = with_classes(tiny_detector(seed=1), [2])
    with pytest.raises(ValueError, match="several teachers are called pets: give each a name of its own"):
        described([Teacher(model, ["a"], name="pets"), Teacher(other, ["b"], name="pets")])


# --- descriptions that cannot be --------------------------------------------------------------------------------------

MODEL = nn.Linear(1, 1)  # looked at only once the description is understood


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("teacher.pt",), "a teacher must be a detector (an nn.Module), got str"),
        ((MODEL, "cat"), "a teacher's classes must be a list of names, got 'cat'"),
        ((MODEL, 3), "a teacher's classes must be a list of names, got 3"),
        ((MODEL, ["a"], ["b"]), "a teacher's class_map must map its class names to the student's, got ['b']"),
    ],
)
def test_a_teacher_of_wrong_parts(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        Teacher(*arguments)


@pytest.mark.parametrize(
    "teacher, keywords, error, message",
    [
        (3, {}, TypeError, "teacher must be a detector (an nn.Module), a Teacher or a list of these, got int"),
        ([MODEL, None], {}, TypeError, "a teacher must be a detector (an nn.Module), got NoneType"),
        (Teacher(MODEL), {"teacher_classes": ["a"]}, ValueError, "a Teacher has its own: Teacher(model, classes=..., "),
        (
            [Teacher(MODEL)],
            {"class_map": [{"a": "b"}]},
            ValueError,
            "teacher_classes and class_map are for plain models",
        ),
        (
            [MODEL, MODEL],
            {"teacher_classes": ["a", "b"]},
            TypeError,
            "a teacher's classes must be a list of names, got 'a'",
        ),
        (
            [MODEL],
            {"teacher_classes": ["a", "b"]},
            ValueError,
            "1 teachers need as many teacher_classes and class_maps",
        ),
    ],
)
def test_descriptions_that_cannot_be(teacher: Any, keywords: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        as_teachers(teacher, **keywords)


@pytest.mark.parametrize("teacher", [None, [], ()])
def test_no_teacher(teacher: Any) -> None:
    assert as_teachers(teacher) == []
    with pytest.raises(ValueError, match="a Distiller with enabled=True needs a teacher"):
        described(teacher)


def test_several_need_names() -> None:
    models = [tiny_detector(seed=1), tiny_detector(seed=2)]
    with pytest.raises(ValueError, match="student_classes and all teacher_classes needed"):
        described([Teacher(models[0], NAMES), Teacher(models[1])])
    with pytest.raises(ValueError, match="student_classes and all teacher_classes needed"):
        Distiller(tiny_detector(), [Teacher(model, NAMES) for model in models])


def test_a_map_needs_names() -> None:
    model = tiny_detector(seed=1)
    with pytest.raises(ValueError, match="a class map needs the names of both sides"):
        described(Teacher(model, class_map={"a": "b"}))


@pytest.mark.parametrize(
    "class_map, message",
    [
        ([None, None], "several teach a (teacher 0 and teacher 1), b (teacher 0 and teacher 1)"),
        (
            [{"b": None}, {"a": None}],
            "several teach c (teacher 0 and teacher 1); map such a class to null in all but one",
        ),
        ([{"b": None}, {"z": "a"}], "teacher 1: class map: 'z' is no class of the teacher"),
        ([{"b": None}], "2 teachers need as many teacher_classes and class_maps, got 2 and 1"),
    ],
)
def test_teams_that_cannot_be(class_map: Any, message: str) -> None:
    models = [tiny_detector(seed=1), tiny_detector(seed=2)]
    with pytest.raises(ValueError, match=re.escape(message)):
        described(models, teacher_classes=[NAMES, NAMES], class_map=class_map)
