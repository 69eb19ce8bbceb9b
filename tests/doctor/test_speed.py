"""How long a step takes."""

from __future__ import annotations

import pytest

from tardkd.doctor import speed

from .reports import doctor, found, numbers


def test_slow_loading_asks_for_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "_load", lambda subject, load=speed._load: (load(subject)[0], 30.0))
    report = doctor(tmp_path, "train.epochs=4", "train.eval_every=3", role="baseline")
    assert "raise train.workers" in found(report, "warning", "speed")[0]
    assert numbers(report, "speed", "seconds") == pytest.approx(4 * 3 * 30, rel=0.5)
    assert "4 epochs" in found(report, "ok", "speed")[1] and "2 evaluations" in found(report, "ok", "speed")[1]


def test_the_speed_parts_add_up(sound):
    step = numbers(sound, "speed", "step")
    parts = [numbers(sound, "speed", key) for key in ("student", "teacher", "rest")]
    assert all(part > 0 for part in parts[:2]) and sum(parts) >= step * 0.99
