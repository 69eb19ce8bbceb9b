"""Every family as student, every family as teacher: the table of pairs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.families import FAMILIES, NAMES, begun, build, planted, trained
from tardkd.detectors import for_model
from tardkd.distill import Distiller, DistillSettings

OPEN = {"feature_gate": "foreground", "classification_gate": "foreground", "regression_gate": "foreground"}


class OwnOps(TorchDispatchMode):
    """Which of tardkd's registered ops run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if op.namespace == "tardkd":
            self.names.append(op._opname)
        return op(*args, **(kwargs or {}))


STUDENTS = pytest.mark.parametrize("student", FAMILIES)
TEACHERS = pytest.mark.parametrize("teacher", FAMILIES)


@STUDENTS
@TEACHERS
def test_any_teacher_teaches_any_student(student: str, teacher: str) -> None:
    """Finite terms above zero beside the student's own losses; gradients in the student alone."""
    pupil, master = build(student), build(teacher, seed=1)
    detector = for_model(copy.deepcopy(pupil).train())
    torch.manual_seed(5)
    _, plain = detector.call(detector.read_call(*planted()))
    distiller = Distiller(pupil, master, DistillSettings(**OPEN), student_classes=NAMES, teacher_classes=NAMES).train()
    torch.manual_seed(5)
    with OwnOps() as called:
        losses = distiller(*planted())
    fused = "pooled_distill" if student == teacher == "faster_rcnn" else "region_distill"
    assert {"pooled_distill", "region_distill"} & set(called.names) == {fused}
    terms = {name: value.item() for name, value in losses.items() if name.startswith("distill_")}
    assert list(terms) == ["distill_feature", "distill_classification", "distill_regression"]
    assert all(0 < value < float("inf") for value in terms.values()), terms
    assert {name: losses[name].item() for name in plain} == {name: value.item() for name, value in plain.items()}
    torch.stack([losses[name] for name in terms]).sum().backward()
    reached = [weight.grad for weight in pupil.parameters() if weight.grad is not None]
    assert reached and all(gradient.isfinite().all() for gradient in reached)
    assert any(gradient.any() for gradient in reached)
    assert all(weight.grad is None for weight in master.parameters())


@STUDENTS
@TEACHERS
def test_the_gates_tell_a_good_teacher_from_a_bad_one(student: str, teacher: str) -> None:
    """One that has learnt the planted objects opens them to a student that has begun to; one with random weights does
    not."""
    seen = {}
    for name, master in (("good", trained(teacher)), ("bad", build(teacher, seed=1))):
        distiller = Distiller(begun(student), master, student_classes=NAMES, teacher_classes=NAMES).train()
        torch.manual_seed(5)
        distiller(*planted())
        seen[name] = {key: value.item() for key, value in distiller.stats.items()}
    good, bad = seen["good"], seen["bad"]
    assert good["gate_classification"] > 0.5 > 0.4 > bad["gate_classification"], seen
    assert good["gate_regression"] >= bad["gate_regression"], seen
    assert good["teacher_iou"] > bad["teacher_iou"], seen
