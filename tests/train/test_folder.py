"""Output folders are claimed, and never cleared of what is not our own."""

from __future__ import annotations

import pytest

from tardkd.train.checkpoint import CheckpointError
from tardkd.train.config import ConfigError
from tardkd.train.loop import train

from .recipe import recipe


def test_an_output_folder_in_use_is_refused(runs, tmp_path):
    config = recipe(tmp_path, "train.epochs=1", "data.train=2").for_role("baseline")
    folder = tmp_path / "baseline"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "train.csv").write_text("epoch,step\n9,9\n")
    with pytest.raises(ConfigError, match=r"is in use \(it holds train.csv\); --resume"):
        train(config)
    assert (folder / "train.csv").read_text() == "epoch,step\n9,9\n"
    train(config, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert "9,9" not in (folder / "train.csv").read_text()


def test_nothing_is_made_where_the_run_cannot_start(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint at .*teacher/last.pt"):
        train(recipe(tmp_path).for_role("distilled"))
    with pytest.raises(ConfigError, match="teacher.weights: required"):
        train(recipe(tmp_path / "x"))
    assert not list(tmp_path.iterdir())
