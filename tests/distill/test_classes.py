"""Label sets that differ: who teaches what, and that nothing else is touched."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from detectors.tiny import tiny_batch, tiny_detector
from torch import Tensor, nn

from tardkd.detectors.base import HeadOutputs, HeadSettings, Regions
from tardkd.distill import Distiller, DistillSettings
from tardkd.distill.classes import ClassMap, match_classes

OPEN = {"feature_gate": "foreground", "classification_gate": "foreground", "regression_gate": "foreground"}
ADAPTIVE = {"feature_gate": "either", "classification_gate": "teacher_better", "regression_gate": "vs_student"}
ALL = {**OPEN, "feature_gate": "all", "classification_gate": "all"}
NAMES = ["a", "b", "c"]


def run(distiller: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return {name: value for name, value in distiller(*tiny_batch()).items() if name.startswith("distill_")}


def with_classes(model: nn.Module, order: list[int]) -> nn.Module:
    """A copy whose head has the classes (from 1) of ``model`` that ``order`` names."""
    model = copy.deepcopy(model)
    predictor, rows = model.roi_heads.box_predictor, torch.tensor([0, *order])
    old_score, old_box = predictor.cls_score, predictor.bbox_pred
    predictor.cls_score = nn.Linear(old_score.in_features, len(rows))
    predictor.bbox_pred = nn.Linear(old_box.in_features, 4 * len(rows))
    columns = (4 * rows[:, None] + torch.arange(4)).flatten()
    with torch.no_grad():
        for layer, old, index in ((predictor.cls_score, old_score, rows), (predictor.bbox_pred, old_box, columns)):
            layer.weight.copy_(old.weight[index])
            layer.bias.copy_(old.bias[index])
    return model


def pair(
    teacher: nn.Module, names: list[str], class_map: Any = None, student: nn.Module | None = None, **settings: Any
) -> Distiller:
    settings = DistillSettings(**{**OPEN, "balance": "none", "feature_norm": "none", **settings})
    return Distiller(
        student or tiny_detector(), teacher, settings, student_classes=NAMES, teacher_classes=names, class_map=class_map
    )


# --- who is paired ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "teacher, class_map, pairs",
    [
        (["a", "b", "c"], None, [(0, 0), (1, 1), (2, 2)]),
        (["c", "a", "b"], None, [(0, 1), (1, 2), (2, 0)]),
        (["x", "c", "y", "b"], None, [(1, 3), (2, 1)]),
        (["a", "x"], {"x": "c"}, [(0, 0), (2, 1)]),
        (["a", "b", "c"], {"b": None}, [(0, 0), (2, 2)]),
        (["a", "b", "x"], {"a": "b", "b": "a"}, [(0, 1), (1, 0)]),
        (["a", "x"], {"x": "a", "a": None}, [(0, 1)]),
    ],
)
def test_names_match_and_the_map_comes_first(teacher, class_map, pairs):
    classes = match_classes(NAMES, teacher, class_map)
    assert classes.pairs == tuple(pairs) and classes.is_named
    assert classes.is_identity == (teacher == NAMES and class_map is None)
    assert classes.is_partial == (len(pairs) < 3)


@pytest.mark.parametrize(
    "teacher, class_map, message",
    [
        (["x", "y"], None, "no class of the teacher teaches one of the student's; student: a, b, c; teacher: x, y"),
        (["a"], {"a": None}, "no class of the teacher teaches"),
        (["a", "x"], {"y": "b"}, "class map: 'y' is no class of the teacher, which has a, x"),
        (["a", "x"], {"x": "z"}, "class map: 'z' is no class of the student, which has a, b, c"),
        (
            ["a", "x"],
            {"x": "a"},
            "the teacher's classes 'a' and 'x' would both teach 'a'; map all but one of them to null",
        ),
        (["x", "x", "a"], None, "the teacher has several classes called x"),
    ],
)
def test_maps_that_cannot_be(teacher, class_map, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        match_classes(NAMES, teacher, class_map)


def test_what_is_transferred_is_told():
    teacher = tiny_detector(seed=1)
    assert pair(teacher, NAMES).describe() == []
    assert pair(teacher, ["x", "c", "y"], {"x": "a"}).describe() == [
        "the teacher teaches a (its 'x'), c",
        "no teacher for b",
    ]


# --- columns and labels -----------------------------------------------------------------------------------------------


def outputs(count: int, head: HeadSettings, deltas: int) -> HeadOutputs:
    """Columns that carry their class: from 1, the background 0."""
    classes = list(range(1, count + 1))
    with_background = [0, *classes] if head.background == "first" else [*classes, 0]
    logits = with_background if head.activation == "softmax" else classes
    blocks = {4: [9], 4 * count: classes, 4 * (count + 1): with_background}[deltas]
    return HeadOutputs(torch.tensor([logits] * 2), torch.tensor([blocks] * 2).repeat_interleave(4, 1), torch.zeros(2))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("own", ["first", "last"])
@pytest.mark.parametrize("wanted", ["first", "last"])
@pytest.mark.parametrize("deltas", [4, 16, 20])
def test_columns_of_every_kind_of_head(activation, own, wanted, deltas):
    classes = ClassMap(("a", "b"), ("w", "x", "y", "z"), ((0, 3), (1, 1)))  # a: z, b: x
    head = HeadSettings(own, activation, (1.0,) * 4, None)
    taught = classes.teacher_outputs(outputs(4, head, deltas), head, wanted)
    expected = [0, 4, 2] if wanted == "first" else [4, 2, 0]
    assert taught.logits[1].tolist() == (expected if activation == "softmax" else [4, 2])
    blocks = {4: [9], 16: [4, 2], 20: expected}[deltas]
    assert taught.boxes[1].tolist() == [block for block in blocks for _ in range(4)]


def test_all_columns_in_order_are_taken_as_they_are():
    head = HeadSettings("first", "softmax", (1.0,) * 4, None)
    classes = match_classes(NAMES, ["c", "x", "b", "a"])
    given = outputs(3, head, 16)
    taken = classes.student_outputs(given, head)
    assert taken.logits is given.logits and taken.boxes is given.boxes
    labels = torch.tensor([0, 1, 3, -1])
    assert classes.labels(labels, "first") is labels


@pytest.mark.parametrize(
    "background, labels, expected",
    [
        ("first", [0, 1, 2, 3, 4, -1, -7, 99], [0, 1, -1, 2, -1, -1, -1, -1]),
        ("last", [0, 1, 2, 3, 4, -1], [0, -1, 1, 2, -1, -1]),
    ],
)
def test_labels(background, labels, expected):
    classes = match_classes(NAMES, ["c", "a"])
    assert classes.labels(torch.tensor(labels), background).tolist() == expected


# --- the identity -----------------------------------------------------------------------------------------------------

IDENTITIES = pytest.mark.parametrize("classes", [ClassMap(), match_classes(NAMES, NAMES)], ids=["unnamed", "named"])


@IDENTITIES
@pytest.mark.parametrize("background", ["first", "last"])
def test_the_identity_leaves_all_as_it_is(classes, background):
    """Not only equal: it is the very same, so that nothing was copied."""
    assert classes.is_identity and not classes.is_partial
    head = HeadSettings(background, "softmax", (1.0,) * 4, (4, 16))
    given = outputs(3, head, 16)
    regions = Regions([torch.zeros(2, 4)], torch.tensor([1, 3]), torch.zeros(2, 4), given)
    assert classes.student_regions(regions, head) is regions
    assert classes.student_outputs(given, head) is given
    assert classes.teacher_outputs(given, head, background) is given
    for labels in (regions.labels, torch.tensor([0, 7, -1])):
        assert classes.labels(labels, background) is labels
        assert classes.to_student(labels) is labels and classes.from_teacher(labels) is labels
    detections = {"boxes": torch.zeros(2, 4), "labels": regions.labels}
    mapped = classes.detections(detections)
    assert mapped == detections and all(mapped[key] is value for key, value in detections.items())


def test_the_identity_tells_heads_that_differ():
    head = HeadSettings("first", "softmax", (1.0,) * 4, (4, 16))
    ClassMap().check_widths(head, head)
    with pytest.raises(ValueError, match=r"student's head has 4 logits .*teacher's has 6"):
        ClassMap().check_widths(head, replace(head, widths=(6, 24)))


def test_equal_names_still_move_a_background_that_stands_elsewhere():
    head = HeadSettings("last", "softmax", (1.0,) * 4, None)
    moved = match_classes(NAMES, NAMES).teacher_outputs(outputs(3, head, 16), head, "first")
    assert moved.logits[0].tolist() == [0, 1, 2, 3]
    assert moved.boxes[0, ::4].tolist() == [0, 1, 2, 3]


def test_names_are_known_or_not():
    assert not ClassMap().is_named and ClassMap().taught == []
    assert match_classes(NAMES, NAMES).taught == NAMES


@pytest.mark.parametrize("gates", [OPEN, ADAPTIVE, ALL], ids=["open", "adaptive", "all"])
def test_equal_names_are_as_good_as_none(gates):
    teacher = tiny_detector(seed=1)
    settings = DistillSettings(**gates, gaussian=1.0, balance="none", feature_norm="none")
    assert run(pair(teacher, NAMES, gaussian=1.0, **gates)) == run(Distiller(tiny_detector(), teacher, settings))


def test_detections_are_those_of_the_pairs():
    classes = match_classes(NAMES, ["x", "c", "a"])
    detections = {"labels": torch.tensor([1, 2, 3, 2]), "scores": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    mapped = classes.detections(detections)
    assert mapped["labels"].tolist() == [3, 1, 3]
    torch.testing.assert_close(mapped["scores"], torch.tensor([0.2, 0.3, 0.4]))
    assert classes.to_student(torch.tensor([0, 1, 2])).tolist() == [0, 1, 3]


# --- losses and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gates", [OPEN, ADAPTIVE, ALL], ids=["open", "adaptive", "all"])
@pytest.mark.parametrize("path", ["pooled", "pyramid"])
def test_the_order_of_the_teachers_classes_does_not_matter(gates, path):
    teacher = tiny_detector(seed=1)
    plain = pair(teacher, NAMES, **gates, path=path, gaussian=0.5)
    other = pair(with_classes(teacher, [3, 1, 2]), ["c", "a", "b"], **gates, path=path, gaussian=0.5)
    expected, losses = run(plain), run(other)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)
    for name, value in plain.stats.items():
        torch.testing.assert_close(other.stats[name], value)


def test_classes_that_only_the_teacher_has_are_left_out():
    """As if the teacher's head had been cut down to the student's classes."""
    teacher = tiny_detector(seed=1, num_classes=6)
    cut = with_classes(teacher, [2, 5, 4])
    expected = run(pair(cut, NAMES, **ADAPTIVE))
    losses = run(pair(teacher, ["x", "a", "y", "z", "b"], {"z": "c"}, **ADAPTIVE))
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


@pytest.mark.parametrize("gates", [OPEN, ALL], ids=["open", "all"])
@pytest.mark.parametrize("path", ["pooled", "pyramid"])
@pytest.mark.parametrize("sharing", ["student", "both"])
def test_no_gradient_for_classes_that_are_not_taught(gates, path, sharing):
    student = tiny_detector()
    teacher = with_classes(tiny_detector(seed=1), [3, 1])
    distiller = pair(teacher, ["c", "a"], student=student, **gates, path=path, sharing=sharing)
    losses = run(distiller)
    assert all(value.isfinite() and value > 0 for value in losses.values())
    sum(losses.values()).backward()
    predictor = student.roi_heads.box_predictor
    logits, deltas = predictor.cls_score.weight.grad, predictor.bbox_pred.weight.grad.unflatten(0, (4, 4))
    assert [bool(row.any()) for row in logits] == [True, True, False, True]
    assert [bool(block.any()) for block in deltas] == [False, True, False, True]


def test_regions_of_other_classes_are_left_out():
    """Whatever the teacher is, an image of classes that it does not teach changes nothing."""
    distiller = pair(with_classes(tiny_detector(seed=1), [1, 3]), ["a", "c"], gaussian=1.0, path="pooled")
    images, targets = tiny_batch()
    targets = [{**target, "labels": torch.full_like(target["labels"], 2)} for target in targets]
    torch.manual_seed(5)
    losses = distiller(images, targets)
    assert all(value == 0 for name, value in losses.items() if name.startswith("distill_"))
    sum(losses.values()).backward()
    assert distiller.stats["foreground"] == 0
    assert all(parameter.grad is not None for parameter in distiller.parameters())


def test_the_teachers_head_runs_on_its_regions_alone():
    teacher = with_classes(tiny_detector(seed=1), [2])
    rows: list[int] = []
    teacher.roi_heads.box_head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    distiller, whole = pair(teacher, ["b"]), pair(tiny_detector(seed=1), NAMES)
    run(distiller), run(whole)
    assert rows == [int(distiller.stats["foreground"])] and 0 < rows[0] < whole.stats["foreground"]


def test_the_mask_has_the_objects_of_the_mapped_classes():
    only = {"feature": 0.0, "classification": 0.0, "regression": 0.0, "gaussian": 1.0}
    teacher = tiny_detector(seed=1)
    part = run(pair(with_classes(teacher, [2, 3]), ["b", "c"], **only))["distill_gaussian"]
    images, targets = tiny_batch()
    targets = [{key: value[target["labels"] != 1] for key, value in target.items()} for target in targets]
    expected = Distiller(tiny_detector(), teacher, DistillSettings(**only, balance="none"))(images, targets)[
        "distill_gaussian"
    ]
    torch.testing.assert_close(part, expected)


def test_a_strange_label_reaches_no_op(monkeypatch):
    """TARDKD_CHECK=1 refuses labels that are no class: what is not taught is left out before."""
    monkeypatch.setenv("TARDKD_CHECK", "1")
    for gates in (OPEN, ALL):
        run(pair(with_classes(tiny_detector(seed=1), [1]), ["a"], **gates))
