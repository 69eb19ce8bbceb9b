from __future__ import annotations

import csv
import math

import pytest
import torch
import yaml

from tardkd.train import checkpoint, loop
from tardkd.train.build import build_dataset, build_distiller
from tardkd.train.config import ConfigError
from tardkd.train.loop import train

from .recipe import recipe
from .running import assert_same_weights, weights


def columns(path):
    with open(path, newline="") as file:
        return next(csv.reader(file))


def test_what_a_run_leaves_behind(runs):
    common = ["loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"]
    assert columns(runs / "baseline" / "train.csv") == ["epoch", "step", "lr", "loss", *common, "grad_norm", "seconds"]
    distilled = columns(runs / "distilled" / "train.csv")
    assert distilled[:11] == [
        "epoch",
        "step",
        "lr",
        "loss",
        *common,
        "distill_feature",
        "distill_classification",
        "distill_regression",
    ]
    assert {
        "lambda",
        "gate_feature",
        "gate_classification",
        "gate_regression",
        "foreground",
        "teacher_score",
        "student_score",
        "teacher_iou",
        "other_iou",
        "grad_norm",
    } <= set(distilled)
    for role in ("teacher", "baseline", "distilled"):
        folder = runs / role
        assert {path.name for path in folder.iterdir()} == {
            "last.pt",
            "previous.pt",
            "best.pt",
            "train.csv",
            "eval.csv",
            "config.yaml",
            "tensorboard",
        }
        state = checkpoint.load(folder / "last.pt")
        assert (state["epoch"], state["step"]) == (2, 6)
        assert yaml.safe_load((folder / "config.yaml").read_text()) == state["config"]
        with open(folder / "train.csv", newline="") as file:
            assert [row["step"] for row in csv.DictReader(file)] == list("123456")
    adapters = checkpoint.load(runs / "distilled" / "last.pt")["task"]["adapters"]
    assert adapters and not any("adapter" in name for name in weights(runs / "distilled"))


def test_the_terms_add_up_to_the_loss(runs):
    with open(runs / "distilled" / "train.csv", newline="") as file:
        for row in csv.DictReader(file):
            terms = [float(value) for name, value in row.items() if name.startswith(("loss_", "distill_"))]
            assert math.isclose(sum(terms), float(row["loss"]), rel_tol=1e-4)


def test_the_rate_that_is_logged_is_the_rate_that_is_used(runs):
    with open(runs / "baseline" / "train.csv", newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates[0] < rates[2] > rates[5] > 0  # warm-up, then the cosine
    (group,) = checkpoint.load(runs / "baseline" / "last.pt")["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(rates[-1], rel=1e-5)


def test_a_run_repeats_exactly(runs, tmp_path):
    train(recipe(tmp_path).for_role("baseline"))
    assert_same_weights(weights(tmp_path / "baseline"), weights(runs / "baseline"))


def test_baseline_and_distilled_differ_by_the_distillation_alone(runs, tmp_path):
    """Same first weights, same batches and views, same random numbers in the first step."""
    baseline = recipe(runs).for_role("baseline")
    distilled = recipe(runs).for_role("distilled")
    names = build_dataset(baseline, "val").class_names
    plain = build_distiller(baseline, names)
    after_plain = torch.rand(1)
    paired = build_distiller(distilled, names)
    after_paired = torch.rand(1)
    assert_same_weights(plain.student.state_dict(), paired.student.state_dict())
    assert after_plain == after_paired
    first = {}
    for role in ("baseline", "distilled"):
        with open(runs / role / "train.csv", newline="") as file:
            first[role] = next(csv.DictReader(file))
    for name in ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"):
        assert first["baseline"][name] == first["distilled"][name]


def test_a_teacher_of_other_classes_is_refused(runs, tmp_path):
    path = tmp_path / "teacher.pt"
    state = checkpoint.load(runs / "teacher" / "last.pt")
    checkpoint.save(path, {**state, "classes": [f"no {name}" for name in state["classes"]]})
    with pytest.raises(ValueError, match="no class of the teacher teaches one of the student's; student: target, "):
        train(recipe(tmp_path, f"teacher.weights={path}").for_role("distilled"))


def test_a_teacher_from_a_plain_state_dict(runs, tmp_path):
    path = tmp_path / "plain.pth"
    torch.save(weights(runs / "teacher"), path)
    config = recipe(runs, f"teacher.weights={path}").for_role("distilled")
    names = build_dataset(config, "val").class_names
    assert_same_weights(build_distiller(config, names).teacher.state_dict(), weights(runs / "teacher"))
    unknown = recipe(tmp_path, f"teacher.weights={path}", "teacher.model=null")
    with pytest.raises(ConfigError, match="teacher.model: required, because .*plain.pth does not say"):
        train(unknown)
    wrong = recipe(tmp_path, f"teacher.weights={path}", "teacher.model.head_dim=32").for_role("distilled")
    with pytest.raises(ValueError, match="weights .*plain.pth do not fit"):
        train(wrong)


def test_gradients_are_clipped(tmp_path):
    config = recipe(
        tmp_path,
        "train.epochs=1",
        "data.train=2",
        "optimizer.clip_norm=1e-6",
        "optimizer.momentum=0",
        "optimizer.weight_decay=0",
        "optimizer.warmup=0",
        "optimizer.lr=1",
    ).for_role("baseline")
    start = build_distiller(config, build_dataset(config, "val").class_names).student.state_dict()
    train(config)
    end = weights(tmp_path / "baseline")
    moved = math.sqrt(sum(float((end[name] - start[name]).double().square().sum()) for name in start))
    assert 0 < moved < 2e-6


def test_bf16_and_channels_last_run(runs, tmp_path):
    config = recipe(
        tmp_path,
        "train.amp=bf16",
        "train.channels_last=true",
        "train.epochs=1",
        "data.train=2",
        f"teacher.weights={runs}/teacher/last.pt",
    ).for_role("distilled")
    train(config)
    assert all(value.dtype != torch.bfloat16 for value in weights(tmp_path / "distilled").values())


def test_the_best_checkpoint_is_that_of_the_best_epoch(tmp_path, monkeypatch):
    scores = iter([3.0, 5.0, 4.0])

    def evaluate(*_):
        return {"AP": next(scores), **dict.fromkeys(("AP50", "AP75", "APs", "APm", "APl"), 0.0), "per_class": {}}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    result = train(recipe(tmp_path, "train.epochs=3", "data.train=2").for_role("baseline"))
    assert result.best_ap == 5.0 and result.metrics["AP"] == 4.0
    best, last = (checkpoint.load(tmp_path / "baseline" / name) for name in ("best.pt", "last.pt"))
    assert (best["epoch"], best["metrics"]["AP"], last["epoch"], last["best_ap"]) == (2, 5.0, 3, 5.0)
