"""Numbers that are read a step late are the same."""

from __future__ import annotations

from tardkd.train import late
from tardkd.train.loop import train

from .recipe import recipe


def test_a_late_look_at_the_numbers_changes_nothing(runs, tmp_path, monkeypatch):
    """As on a GPU, where a step's numbers are read when the next one has been queued."""
    monkeypatch.setattr(late, "LATE_DEVICES", {"cpu"})
    config = recipe(tmp_path, f"teacher.weights={runs}/teacher/last.pt").for_role("distilled")
    train(config)
    rows = [(folder / "distilled" / "train.csv").read_text().splitlines() for folder in (runs, tmp_path)]
    assert [row.rpartition(",")[0] for row in rows[0]] == [row.rpartition(",")[0] for row in rows[1]]
