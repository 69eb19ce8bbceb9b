"""The term over distributions of boxes' sides, of D-FINE as student and teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tardkd.detectors.base import HeadOutputs
from tardkd.distill import Distiller, DistillSettings
from tardkd.distill.conventions import in_students_bins

from .families import NAMES, begun, planted, trained

ONLY = {"feature": 0.0, "classification": 0.0, "regression": 0.0, "distribution": 2.0, "balance": "none"}


def step(distiller: Distiller) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return distiller(*planted())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_it_is_the_divergence_over_regions_whose_box_may_teach(temperature: float) -> None:
    settings = DistillSettings(**ONLY, regression_gate="vs_student", temperature=temperature)
    distiller = Distiller(begun("d_fine"), trained("d_fine"), settings).train()
    [teacher] = distiller.frozen_teachers
    said: list[HeadOutputs] = []
    original = teacher.detector.answers

    def answers(*args: Any) -> HeadOutputs:
        said.append(original(*args))
        return said[-1]

    teacher.detector.answers = answers  # type: ignore[method-assign]
    losses = step(distiller)
    assert [name for name in losses if name.startswith("distill_")] == ["distill_distribution"]
    torch.manual_seed(5)
    _, [(_, regions, found)] = distiller.look(*planted())
    [first, _], own = said, regions.head.sides
    p = (in_students_bins(first.sides, own, temperature) / temperature).softmax(2)
    q = (own.logits / temperature).softmax(2)
    divergence = temperature**2 * (p * (p.clamp(min=1e-30) / q).log()).sum(2).mean(1)
    gates = found.gates[:, 2]
    assert gates.sum() > 0
    expected = 2.0 * (divergence * gates).sum() / gates.sum()
    torch.testing.assert_close(losses["distill_distribution"], expected, rtol=1e-4, atol=1e-6)


def test_it_teaches_the_box_and_not_the_classes() -> None:
    distiller = Distiller(begun("d_fine"), trained("d_fine"), DistillSettings(**ONLY)).train()
    step(distiller)["distill_distribution"].backward()
    decoder = distiller.student.model.decoder
    assert decoder.bbox_embed[-1].layers[-1].weight.grad.abs().sum() > 0
    assert decoder.class_embed[-1].weight.grad is None
    assert all(weight.grad is None for weight in distiller.teacher.parameters())


def test_it_is_off_where_nobody_asks_for_it() -> None:
    assert "distill_distribution" not in step(Distiller(begun("d_fine"), trained("d_fine")).train())


@pytest.mark.parametrize(
    "student, teacher, which", [("rt_detr_v2", "d_fine", "student"), ("d_fine", "fcos", "teacher")]
)
def test_a_head_without_distributions_is_named(student: str, teacher: str, which: str) -> None:
    with pytest.raises(ValueError, match=rf"the term 'distribution' needs two heads .*; the {which}, a \w+, has none"):
        Distiller(
            begun(student),
            trained(teacher),
            DistillSettings(distribution=1.0),
            student_classes=NAMES,
            teacher_classes=NAMES,
        )


def test_what_is_said_of_its_gate_is_said_of_the_boxes() -> None:
    settings = DistillSettings(**ONLY)
    distiller = Distiller(begun("d_fine"), trained("d_fine"), settings).train()
    told = str(distiller.check(*planted()))
    assert "for regression" in told and "for feature" not in told, told
