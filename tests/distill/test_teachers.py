"""Several teachers, each for classes of its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detectors.tiny import tiny_batch, tiny_detector
from torch import Tensor, nn

from tardkd.distill import Distiller, DistillSettings, ScheduleSettings

from .test_classes import ADAPTIVE, ALL, NAMES, OPEN, run

TERMS = ["distill_feature", "distill_classification", "distill_regression"]
FIRST = {"b": None}  # the first of two copies teaches a and c ...
SECOND = {"a": None, "c": None}  # ... and the second b


def team(teachers: list[nn.Module], class_map: Any = (FIRST, SECOND), names: Any = None, **settings: Any) -> Distiller:
    return Distiller(
        tiny_detector(),
        teachers,
        DistillSettings(**{**OPEN, "balance": "none", "feature_norm": "none", **settings}),
        student_classes=NAMES,
        teacher_classes=names or [NAMES] * len(teachers),
        class_map=list(class_map),
    )


def alone(teacher: nn.Module, **settings: Any) -> Distiller:
    return Distiller(
        tiny_detector(), teacher, DistillSettings(**{**OPEN, "balance": "none", "feature_norm": "none", **settings})
    )


@pytest.mark.parametrize("path", ["pooled", "pyramid"])
def test_copies_of_one_teacher_are_that_teacher(path):
    """But for the classification, which compares a region with fewer classes."""
    teacher = tiny_detector(seed=1)
    one, two = alone(teacher, path=path), team([teacher, copy.deepcopy(teacher)], path=path)
    expected, losses = run(one), run(two)
    for name in ("distill_feature", "distill_regression"):
        torch.testing.assert_close(losses[name], expected[name])
    assert losses["distill_classification"] > 0
    for name in ("foreground", "gate_feature", "teacher_iou", "other_iou"):
        torch.testing.assert_close(two.stats[name], one.stats[name])
    (expected["distill_feature"] + expected["distill_regression"]).backward()
    (losses["distill_feature"] + losses["distill_regression"]).backward()
    for (name, a), b in zip(two.student.named_parameters(), one.student.parameters()):
        if a.grad is not None or b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_one_in_a_list_is_one():
    teacher = tiny_detector(seed=1, channels=12)
    plain = alone(teacher)
    listed = team([teacher], [None])
    listed.load_state_dict(plain.state_dict())
    assert run(listed) == run(plain)
    assert listed.teacher is teacher and listed.teachers == [teacher]


@pytest.mark.parametrize("gates", [OPEN, ADAPTIVE, ALL], ids=["open", "adaptive", "all"])
def test_a_term_is_the_mean_over_the_open_gates_of_all(gates):
    """Each teacher alone gives a mean over its gates; together they are weighted by their numbers."""
    models = [tiny_detector(seed=1), tiny_detector(seed=2)]
    both = team(models, **gates)
    losses = run(both)
    parts, open_gates, regions = [], [], []
    for model, class_map in zip(models, (FIRST, SECOND)):
        part = team([model], [class_map], **gates)
        seen = watch_gates(part)
        parts.append(run(part))
        open_gates.append(seen[0].sum(0))
        regions.append(part.stats["foreground"])
    assert both.stats["foreground"] == sum(regions)
    for place, name in enumerate(TERMS):
        counts = [own[place] for own in open_gates]
        assert sum(counts) > 0
        expected = sum(part[name] * count for part, count in zip(parts, counts)) / sum(counts)
        torch.testing.assert_close(losses[name], expected)


def watch_gates(distiller: Distiller) -> list[Tensor]:
    seen: list[Tensor] = []
    [teacher] = distiller._teachers
    original = teacher.region_losses

    def region_losses(*args: Any) -> Any:
        losses = original(*args)
        seen.append(losses.gates)
        return losses

    teacher.region_losses = region_losses
    return seen


def test_the_mask_is_shared_by_objects():
    only = {"feature": 0.0, "classification": 0.0, "regression": 0.0, "gaussian": 1.0}
    models = [tiny_detector(seed=1), tiny_detector(seed=2)]
    first, second = (
        run(team([model], [class_map], **only))["distill_gaussian"] for model, class_map in zip(models, (FIRST, SECOND))
    )
    # Of the three objects of the batch two are an a and a c.
    torch.testing.assert_close(run(team(models, **only))["distill_gaussian"], (2 * first + second) / 3)


@pytest.mark.parametrize("sharing", ["student", "teacher", "both"])
@pytest.mark.parametrize("path", ["auto", "pyramid"])
def test_unlike_teachers(sharing, path):
    teachers = [
        tiny_detector(seed=1, num_classes=3, channels=12, size=96),
        tiny_detector(seed=2, num_classes=6, levels=3, image_mean=[0.0, 0.0, 0.0], output_size=5),
    ]
    names = [["c", "a"], ["v", "w", "b", "x", "y"]]
    distiller = team(teachers, [None, None], names, sharing=sharing, path=path)
    sizes: list[int] = []
    for teacher in teachers:
        teacher.backbone.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-1]))
    losses = run(distiller)
    assert all(0 < losses[name] < 100 for name in TERMS)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in distiller.adapters.parameters())
    assert sizes == [128, 96]  # images 80 wide, times 1.5, and padded to 32
    assert distiller.describe() == ["teacher 0 teaches a, c", "teacher 1 teaches b"]


def test_all_teachers_start_before_the_students_trunk():
    teachers = [tiny_detector(seed=1), tiny_detector(seed=2)]
    distiller = team(teachers)
    order: list[str] = []
    for name, model in (("student", distiller.student), ("first", teachers[0]), ("second", teachers[1])):
        model.backbone.register_forward_pre_hook(lambda module, args, name=name: order.append(name))
    run(distiller)
    assert order == ["first", "second", "student"]


def test_state_and_freezing():
    teachers = [tiny_detector(seed=1, channels=12), tiny_detector(seed=2, channels=6)]
    distiller = team(teachers)
    own = [name for name in distiller.state_dict() if name.startswith("adapters.")]
    assert own == [f"adapters.feature_{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")]
    assert not any(p.requires_grad for teacher in teachers for p in teacher.parameters())
    assert not any(teacher in list(distiller.modules()) for teacher in teachers)
    other = team([tiny_detector(seed=1, channels=12), tiny_detector(seed=2, channels=6)])
    other.load_task_state(distiller.task_state())
    assert run(other) == run(distiller)


def test_every_parameter_gets_a_gradient_in_every_step():
    """Of a teacher without a region in the batch, too, and after the stop: DDP waits for all of them."""
    teachers = [tiny_detector(seed=1, channels=12), tiny_detector(seed=2, channels=6)]
    distiller = team(teachers, schedule=ScheduleSettings(stop=0.5), gaussian=1.0)
    distiller.start(2, 1)
    images, targets = tiny_batch()
    second_only = [{**target, "labels": torch.full_like(target["labels"], 2)} for target in targets]
    for epoch in (0, 1):
        distiller.set_progress(epoch, 0)
        distiller.zero_grad()
        sum(distiller(images, second_only).values()).backward()
        assert all(parameter.grad is not None for parameter in distiller.parameters())


def test_what_is_not_finite_is_named_with_its_teacher():
    broken = tiny_detector(seed=2)
    with torch.no_grad():
        broken.roi_heads.box_predictor.cls_score.bias[2] = torch.nan
    with pytest.raises(FloatingPointError, match="teacher 1's logits"):
        run(team([tiny_detector(seed=1), broken], **ADAPTIVE))
