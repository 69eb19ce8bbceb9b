"""Steps that are not finite may be dropped, but not too many in a row."""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from tardkd.train import checkpoint
from tardkd.train.blame import NonFiniteLoss
from tardkd.train.loop import train

from .recipe import recipe
from .running import broken_at, overflows_at, rows


def test_a_step_may_be_skipped(tmp_path, monkeypatch, capsys):
    """Its gradients and its batch statistics are dropped; the run goes on."""
    broken_at(monkeypatch, {1}, where="images")
    config = recipe(tmp_path, "train.on_non_finite=skip", "student.norm=batch", "train.epochs=1").for_role("baseline")
    result = train(config, console=Console(width=200))
    assert "skipped: " in capsys.readouterr().out
    assert [math.isnan(row["loss"]) for row in rows(result.folder)] == [False, True, False]
    assert all(value.isfinite().all() for value in checkpoint.load(result.folder / "last.pt")["model"].values())


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
