"""A run goes on from its checkpoint, and nothing else does."""

from __future__ import annotations

import shutil

import pytest
import torch

from tardkd.train import checkpoint, resume
from tardkd.train.checkpoint import CheckpointError
from tardkd.train.config import ConfigError
from tardkd.train.loop import train

from .recipe import recipe
from .running import assert_same_weights, interrupted, weights


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("role", ["baseline", "distilled"])
def test_resuming_continues_exactly(runs, tmp_path, monkeypatch, role, kind):
    def config(name):
        extra = f"optimizer.kind={kind}", f"teacher.weights={runs}/teacher/last.pt", "data.train=5"
        return recipe(tmp_path / name, *extra).for_role(role)

    whole = train(config("whole"))
    interrupted(monkeypatch, config("parts"), epoch=1)
    torch.rand(5)  # a new process would not have the old generators, either
    parts = train(config("parts"), resume=True)
    assert_same_weights(weights(whole.folder), weights(parts.folder))
    one, two = (checkpoint.load(result.folder / "last.pt") for result in (whole, parts))
    torch.testing.assert_close(one["optimizer"], two["optimizer"], rtol=0, atol=0)
    torch.testing.assert_close(one["task"], two["task"], rtol=0, atol=0)
    assert (one["metrics"], one["best_ap"], one["step"]) == (two["metrics"], two["best_ap"], two["step"])
    first, second = ((result.folder / "train.csv").read_text().splitlines() for result in (whole, parts))
    assert [line.rsplit(",", 1)[0] for line in first] == [line.rsplit(",", 1)[0] for line in second]  # but for seconds


def test_resuming_a_finished_run_does_nothing(runs, tmp_path):
    before = (runs / "baseline" / "last.pt").read_bytes()
    result = train(recipe(runs).for_role("baseline"), resume=True)
    assert (runs / "baseline" / "last.pt").read_bytes() == before
    assert result.metrics["AP"] is not None


def test_resume_refuses_another_run(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"other settings: optimizer.lr \(0.01 -> 0.5\), train.epochs \(2 -> 3\)"):
        train(recipe(runs, "optimizer.lr=0.5", "train.epochs=3", "train.workers=1").for_role("baseline"), resume=True)
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        train(recipe(tmp_path).for_role("baseline"), resume=True)


def test_a_run_that_was_moved_goes_on_with_the_same_teacher_alone(runs, tmp_path, monkeypatch):
    """The recipe's own teacher lies beside it: another `output` is another path to the same weights."""
    shutil.copytree(runs / "teacher", tmp_path / "old" / "teacher")
    interrupted(monkeypatch, recipe(tmp_path / "old").for_role("distilled"), epoch=1)
    (tmp_path / "old").rename(tmp_path / "new")
    config = recipe(tmp_path / "new").for_role("distilled")
    other = tmp_path / "other.pt"
    state = checkpoint.load(tmp_path / "new" / "teacher" / "last.pt")
    name = "roi_heads.box_predictor.cls_score.bias"
    checkpoint.save(other, {**state, "model": {**state["model"], name: state["model"][name] + 1}})
    with pytest.raises(ConfigError, match=f"teacher.weights {other} holds other weights than the run began with"):
        train(recipe(tmp_path / "new", f"teacher.weights={other}").for_role("distilled"), resume=True)
    train(config, resume=True)
    assert_same_weights(weights(tmp_path / "new" / "distilled"), weights(runs / "distilled"))


def test_several_teachers_are_compared_one_by_one():
    flat = resume._flat({"teacher": [{"weights": "a", "model": {"width": 1}}, {"weights": "b"}], "sizes": [1, 2]})
    assert flat == {"teacher.0.weights": "a", "teacher.0.model.width": 1, "teacher.1.weights": "b", "sizes": [1, 2]}
    assert [bool(resume.MOVABLE.fullmatch(key)) for key in flat] == [True, False, True, False]


def test_a_checkpoint_from_before_a_setting_existed_is_resumed(runs, tmp_path):
    """With that setting at its default; at another value it would be another run."""
    shutil.copytree(runs / "baseline", tmp_path / "baseline")
    state = checkpoint.load(tmp_path / "baseline" / "last.pt")
    del state["config"]["train"]["group_by_aspect"]
    checkpoint.save(tmp_path / "baseline" / "last.pt", state)
    train(recipe(tmp_path).for_role("baseline"), resume=True)
    with pytest.raises(ConfigError, match="train.group_by_aspect"):
        train(recipe(tmp_path, "train.group_by_aspect=false").for_role("baseline"), resume=True)
