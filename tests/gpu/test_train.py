"""The training loop on a GPU: half precision, averages, parts of a batch, resuming."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from train.recipe import recipe

from tardkd.train import checkpoint, loop
from tardkd.train.loop import train

pytestmark = pytest.mark.gpu

KINDS = [
    (),
    ("train.amp=bf16",),
    ("train.amp=fp16",),
    ("train.ema=0.9",),
    ("train.accumulate=2",),
    ("distill.teacher_bf16=true", "train.channels_last=true"),
    ("train.on_non_finite=skip",),
]


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    return train(recipe(folder, "train.device=cuda").for_role("teacher")).folder / "last.pt"


@pytest.mark.parametrize("settings", KINDS, ids=" ".join)
def test_it_runs_and_resumes(tmp_path, monkeypatch, teacher, settings):
    """Deterministic algorithms: else atomics add up in another order."""

    def config(name):
        extra = ("train.device=cuda", "train.save_every=1", f"teacher.weights={teacher}", *settings)
        return recipe(tmp_path / name, *extra).for_role("distilled")

    original = loop.RunLog.step

    def step(self, epoch, number, *args, **kwargs):
        original(self, epoch, number, *args, **kwargs)
        if number == 3:
            raise Stopped

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = train(config("whole"))
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(loop.RunLog, "step", step)
            train(config("parts"))
        parts = train(config("parts"), resume=True)
    finally:
        torch.use_deterministic_algorithms(False)
    one, two = (checkpoint.load(run.folder / "last.pt") for run in (whole, parts))
    torch.testing.assert_close(one["model"], two["model"], rtol=1e-3, atol=1e-4)
    with open(whole.folder / "train.csv", newline="") as file:
        assert all(math.isfinite(float(row["loss"])) for row in csv.DictReader(file))
