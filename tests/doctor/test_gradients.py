"""The first steps of the run."""

from __future__ import annotations

import csv
import warnings

import pytest
import torch
from train.recipe import recipe

from tardkd.distill.balance import BalanceWarning
from tardkd.distill.examination import SHARE
from tardkd.doctor import gradients, teacher
from tardkd.train.loop import train

from .reports import doctor, found, numbers


def test_the_suggested_weights_bring_every_term_to_the_stated_share(tmp_path, weights, no_standards, monkeypatch):
    monkeypatch.setattr(gradients, "STEPS", 1)
    open_gate = "distill.regression_gate=foreground"  # such a teacher's boxes would not open it
    suggested = numbers(doctor(tmp_path, weights, open_gate), "gradients", "suggested")
    assert suggested.keys() == {"feature", "classification", "regression"}
    after = doctor(tmp_path, weights, open_gate, *(f"distill.{name}={value}" for name, value in suggested.items()))
    shares = numbers(after, "gradients", "shares")
    assert all(share == pytest.approx(SHARE, rel=0.05) for share in shares.values())
    assert not found(after, "warning", "gradients")


def test_terms_that_are_too_strong_or_too_weak_are_named(tmp_path, weights, no_standards):
    with warnings.catch_warnings():
        warnings.simplefilter("error", BalanceWarning)  # which the report makes superfluous
        report = doctor(tmp_path, weights, "distill.feature=1000", "distill.regression=1e-6")
    text = next(text for text in found(report, "warning", "gradients") if "gradient norm" in text)
    assert "feature" in text.split(";")[-1] and "regression" in text.split(";")[-1]


def test_a_parameter_that_no_loss_uses_is_named(tmp_path, monkeypatch):
    original = teacher.build_distiller

    def with_spare(*args):
        distiller = original(*args)
        distiller.student.spare = torch.nn.Parameter(torch.zeros(3))
        return distiller

    monkeypatch.setattr(teacher, "build_distiller", with_spare)
    (text,) = found(doctor(tmp_path, role="baseline"), "problem")
    assert "no gradient reaches 1 of" in text and "student.spare" in text


def test_a_term_that_is_not_finite_is_named_with_its_images(tmp_path, monkeypatch):
    original = teacher.build_distiller

    def with_nan(*args):
        distiller = original(*args)
        with torch.no_grad():
            distiller.student.rpn.head.cls_logits.bias.fill_(torch.nan)
        return distiller

    monkeypatch.setattr(teacher, "build_distiller", with_nan)
    report = doctor(tmp_path, role="baseline")
    assert "loss_objectness is nan" in found(report, "problem", "gradients")[0]
    assert "images" in found(report, "problem", "gradients")[0]


@pytest.mark.parametrize("settings", [(), ("train.accumulate=2",), ("train.amp=fp16",)], ids=" ".join)
def test_its_steps_are_those_of_the_run(tmp_path, weights, no_standards, settings):
    """The same images in the same parts, seeds, precision and rates: the losses are the run's own."""
    settings = (weights, "train.epochs=1", *settings)
    examined = numbers(doctor(tmp_path, *settings), "gradients", "loss")
    folder = train(recipe(tmp_path, *settings).for_role("distilled")).folder
    with open(folder / "train.csv", newline="") as file:
        assert examined == pytest.approx([float(row["loss"]) for row in csv.DictReader(file)], rel=1e-5)
