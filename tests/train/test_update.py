"""One update: parts of a batch, precision, the average of the weights, losses that are not finite."""

from __future__ import annotations

import copy
import csv
import math

import pytest
import torch
from rich.console import Console

from tardkd.train import checkpoint, late, loop
from tardkd.train.batches import build_batches
from tardkd.train.blame import NonFiniteLoss
from tardkd.train.build import build_dataset, build_distiller
from tardkd.train.distributed import Processes
from tardkd.train.loop import train
from tardkd.train.update import Update

from .recipe import recipe


def rows(folder):
    with open(folder / "train.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def broken_at(monkeypatch, steps, term="loss_objectness", where="loss"):
    """A distiller whose term is NaN at these steps (from 0)."""
    original = loop.build_distiller

    def build(*args):
        distiller = original(*args)
        forward = distiller.forward

        def with_nan(images, targets):
            if where == "images" and distiller.schedule.step in steps:
                images = [image * float("nan") for image in images]
            losses = forward(images, targets)
            if where == "loss" and distiller.schedule.step in steps:
                losses[term] = losses[term] * float("nan")
            return losses

        distiller.forward = with_nan
        return distiller

    monkeypatch.setattr(loop, "build_distiller", build)


def test_parts_of_a_batch_are_the_batch(tmp_path):
    """But for rounding, as long as every image gives as many regions."""
    even = ("train.batch_size=4", "data.train=8", "student.rpn_post_nms_top_n_train=40", "train.epochs=1")
    configs = [recipe(tmp_path / str(n), *even, f"train.accumulate={n}").for_role("baseline") for n in (1, 2)]
    whole, parts = map(train, configs)
    assert len(rows(whole.folder)) == len(rows(parts.folder)) == 2
    for left, right in zip(rows(whole.folder), rows(parts.folder)):
        del left["seconds"], right["seconds"]
        assert left == pytest.approx(right, rel=1e-3)
    states = [checkpoint.load(run.folder / "last.pt")["model"] for run in (whole, parts)]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-5)


def test_a_step_does_not_depend_on_what_was_drawn_before(tmp_path):
    config = recipe(tmp_path).for_role("baseline")
    dataset = build_dataset(config, "train", augment=True)
    distiller = build_distiller(config, dataset.class_names).train()
    update = Update(config, distiller, Processes())
    parts = [next(iter(build_batches(config, dataset, epoch=0)))]
    first, again, other = (update.gradients(step, parts)[0]["loss"] for step in (3, 3, 4))
    assert first == again != other


def test_the_average_of_the_weights(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda path, state, **_: saved.append((path.name, copy.deepcopy(state))))
    settings = ("train.ema=0.75", "train.save_every=1", "train.epochs=1", "data.train=4")
    train(recipe(tmp_path, *settings).for_role("baseline"))
    by_step = {state["step"]: state for name, state in saved if name == "last.pt"}
    one, two = by_step[1], by_step[2]
    assert (one["averaged"], two["averaged"]) == (1, 2)
    for name, value in two["model"].items():
        first, second = one["student"][name], two["student"][name]
        assert torch.equal(one["model"][name], first)
        torch.testing.assert_close(value, 0.75 * first + 0.25 * second)
    assert any(not torch.equal(value, two["student"][name]) for name, value in two["model"].items())


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision(runs, tmp_path, amp):
    """Also the terms of the distillation stay finite; fp16 begins with a scale of 65536."""
    settings = (f"train.amp={amp}", f"teacher.weights={runs}/teacher/last.pt")
    result = train(recipe(tmp_path, *settings).for_role("distilled"))
    assert all(math.isfinite(value) for row in rows(result.folder) for name, value in row.items() if "distill" in name)
    state = checkpoint.load(result.folder / "last.pt")
    assert all(value.isfinite().all() for value in state["model"].values())
    assert bool(state["scaler"]) == (amp == "fp16")
    exact = rows(runs / "distilled")
    assert rows(result.folder)[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.1)


def test_gradients_of_fp16_are_clipped_and_logged_without_the_scale(runs, tmp_path):
    result = train(recipe(tmp_path, "train.amp=fp16").for_role("baseline"))
    finite = [row["grad_norm"] for row in rows(result.folder) if math.isfinite(row["grad_norm"])]
    exact = [row["grad_norm"] for row in rows(runs / "baseline")]
    assert finite and max(finite) < 10 * max(exact)


@pytest.mark.parametrize("settings", [("train.ema=0.9",), ("train.amp=fp16",), ("train.accumulate=2",)])
def test_resuming_these_continues_exactly(tmp_path, monkeypatch, settings):
    def config(name):
        return recipe(tmp_path / name, "train.save_every=1", *settings).for_role("baseline")

    class Stopped(Exception):
        pass

    original = loop.RunLog.step

    def step(self, epoch, number, *args, **kwargs):
        original(self, epoch, number, *args, **kwargs)
        if number == 3:
            raise Stopped

    whole = train(config("whole"))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop.RunLog, "step", step)
        train(config("parts"))
    parts = train(config("parts"), resume=True)
    one, two = (checkpoint.load(run.folder / "last.pt") for run in (whole, parts))
    for key in ("model", "optimizer", "scaler", "task") + (("student",) if "student" in one else ()):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)
    assert (one["metrics"], one["step"]) == (two["metrics"], two["step"])


@pytest.mark.parametrize("devices", [set(), {"cpu"}], ids=["at once", "late"])
def test_the_images_of_a_step_that_failed_are_kept(tmp_path, monkeypatch, devices):
    monkeypatch.setattr(late, "LATE_DEVICES", devices)
    broken_at(monkeypatch, {1})
    config = recipe(tmp_path).for_role("baseline")
    with pytest.raises(NonFiniteLoss, match=r"loss_objectness is nan at step 2, images \d, \d; .*failed\.pt holds"):
        train(config)
    failed = checkpoint.load(tmp_path / "baseline" / "failed.pt")
    ((images, targets),) = failed["parts"]
    assert failed["step"] == 2 and ("model" in failed) == (not devices)
    dataset = build_dataset(config, "train", augment=True)
    expected, _ = list(build_batches(config, dataset, epoch=0))[1]
    assert all(torch.equal(*pair) for pair in zip(images, expected, strict=True))
    assert {"boxes", "labels", "image_id"} <= targets[0].keys()
    monkeypatch.undo()
    train(config, overwrite=True)
    assert not (tmp_path / "baseline" / "failed.pt").exists()


def test_a_step_may_be_skipped(tmp_path, monkeypatch, capsys):
    """Its gradients and its batch statistics are dropped; the run goes on."""
    broken_at(monkeypatch, {1}, where="images")
    config = recipe(tmp_path, "train.on_non_finite=skip", "student.norm=batch", "train.epochs=1").for_role("baseline")
    result = train(config, console=Console(width=200))
    assert "skipped: " in capsys.readouterr().out
    assert [math.isnan(row["loss"]) for row in rows(result.folder)] == [False, True, False]
    assert all(value.isfinite().all() for value in checkpoint.load(result.folder / "last.pt")["model"].values())


def overflows_at(monkeypatch, step):
    """A gradient that is infinite at this step (from 0), where the losses are not."""
    original = Update.gradients

    def gradients(self, number, parts):
        found = original(self, number, parts)
        if number == step:
            self._parameters[0].grad.view(-1)[0] = math.inf
        return found

    monkeypatch.setattr(Update, "gradients", gradients)


@pytest.mark.parametrize("devices", [set(), {"cpu"}], ids=["at once", "late"])
@pytest.mark.parametrize("save_every", [(), ("train.save_every=1",)], ids=["epochs", "steps"])
def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(tmp_path, monkeypatch, devices, save_every):
    """At the last step of an epoch, after which nothing else would look before a save."""
    monkeypatch.setattr(late, "LATE_DEVICES", devices)
    overflows_at(monkeypatch, 3)
    config = recipe(tmp_path, "data.train=4", *save_every).for_role("baseline")
    with pytest.raises(NonFiniteLoss, match=r"the gradient's norm is inf at step 4, images \d, \d; .*failed\.pt holds"):
        train(config)
    folder = tmp_path / "baseline"
    assert checkpoint.load(folder / "last.pt")["step"] == (3 if save_every else 2)
    for path in folder.glob("*.pt"):
        state = checkpoint.load(path)
        assert all(value.isfinite().all() for value in state.get("model", {}).values()), path
    monkeypatch.undo()
    train(config, resume=True)


@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_a_gradient_that_is_not_finite_may_be_skipped(tmp_path, monkeypatch, capsys, amp):
    """A scaler does so by itself."""
    overflows_at(monkeypatch, 1)
    config = recipe(tmp_path, "train.on_non_finite=skip", f"train.amp={amp}", "train.epochs=1").for_role("baseline")
    result = train(config, console=Console(width=200))
    assert ("skipped: the gradient's norm is inf" in capsys.readouterr().out) == (amp == "none")
    assert len(rows(result.folder)) == 3
    assert all(value.isfinite().all() for value in checkpoint.load(result.folder / "last.pt")["model"].values())


def test_a_distilled_step_may_be_skipped(runs, tmp_path, monkeypatch, capsys):
    broken_at(monkeypatch, {1}, where="images")
    weights = f"teacher.weights={runs}/teacher/last.pt"
    config = recipe(tmp_path, "train.on_non_finite=skip", "train.epochs=1", weights).for_role("distilled")
    result = train(config, console=Console(width=200))
    assert "skipped: loss is nan" in capsys.readouterr().out
    assert [math.isnan(row["loss"]) for row in rows(result.folder)] == [False, True, False]


def test_too_many_skips_stop(tmp_path, monkeypatch):
    broken_at(monkeypatch, set(range(100)))
    config = recipe(tmp_path, "train.on_non_finite=skip", "train.epochs=9").for_role("baseline")
    with pytest.raises(NonFiniteLoss, match="at step 10"):
        train(config)


def test_statistics_over_processes_need_gpus(tmp_path):
    from tardkd.train.config import ConfigError

    with pytest.raises(ConfigError, match="sync_bn"):
        train(recipe(tmp_path, "train.sync_bn=true", "train.device=cpu").for_role("baseline"))
