"""One update: parts of a batch, precision, the average of the weights, losses that are not finite."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tardkd.train import checkpoint, loop
from tardkd.train.batches import build_batches
from tardkd.train.build import build_dataset, build_distiller
from tardkd.train.distributed import Processes
from tardkd.train.loop import train
from tardkd.train.update import Update

from .recipe import recipe
from .running import rows


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


def test_statistics_over_processes_need_gpus(tmp_path):
    from tardkd.train.config import ConfigError

    with pytest.raises(ConfigError, match="sync_bn"):
        train(recipe(tmp_path, "train.sync_bn=true", "train.device=cpu").for_role("baseline"))
