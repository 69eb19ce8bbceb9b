"""A run goes on from its checkpoint, and nothing else does."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
import yaml

from tardkd import cli
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


def damaged(state, *keys, value=...):
    """A copy of the checkpoint with one of its values replaced, or deleted for ``...``."""
    state = copy.deepcopy(state)
    *parents, last = keys
    entry = state
    for key in parents:
        entry = entry[key]
    if value is ...:
        del entry[last]
    else:
        entry[last] = value
    return state


TENSOR = "roi_heads.box_predictor.cls_score.bias"
TRAINED = [("config",), ("model",), ("classes",), ("model", TENSOR), ("config", "student"), ("config", "data")]
RESUMED = [("epoch",), ("batch",), ("step",), ("best_ap",), ("metrics",), ("task",), ("optimizer",)]
RESUMED += [("task", "adapters"), ("task", "schedule"), ("optimizer", "state"), ("optimizer", "param_groups")]
RESUMED += [("optimizer", "param_groups", 0, "params")]
VALUES = [..., None, 3.5, "text", [1, 2], {"a": 1}, torch.ones(2)]


@pytest.mark.parametrize("keys", TRAINED, ids=".".join)
@pytest.mark.parametrize("value", VALUES, ids=[type(value).__name__ for value in VALUES])
def test_a_checkpoint_without_a_student_is_named(runs, tmp_path, capsys, keys, value):
    shutil.copytree(runs / "baseline", tmp_path / "baseline")
    path = tmp_path / "baseline" / "last.pt"
    checkpoint.save(path, damaged(checkpoint.load(path), *keys, value=value))
    for command in (["eval", str(path)], ["export", str(path), "--out", str(tmp_path / "x.ts")]):
        assert cli.main(command) == 2
        assert str(path) in capsys.readouterr().err
    with pytest.raises((CheckpointError, ConfigError), match=str(path)):
        train(recipe(tmp_path).for_role("baseline"), resume=True)


@pytest.mark.parametrize("keys", RESUMED, ids=lambda keys: ".".join(map(str, keys)))
@pytest.mark.parametrize("value", VALUES, ids=[type(value).__name__ for value in VALUES])
def test_a_checkpoint_that_cannot_be_resumed_is_named(runs, tmp_path, keys, value):
    shutil.copytree(runs / "distilled", tmp_path / "distilled")
    path = tmp_path / "distilled" / "last.pt"
    state = checkpoint.load(path)
    if (keys[0] == "best_ap" and isinstance(value, float)) or (keys[0] == "metrics" and isinstance(value, dict)):
        pytest.skip("it is a value that may be there")
    checkpoint.save(path, damaged(state, *keys, value=value))
    config = recipe(tmp_path, f"teacher.weights={runs}/teacher/last.pt").for_role("distilled")
    with pytest.raises((CheckpointError, ConfigError), match=str(path)):
        train(config, resume=True)


def test_a_tensor_of_the_optimizer_that_does_not_fit_is_named(runs, tmp_path):
    """torch takes it, and fails in the first step."""
    shutil.copytree(runs / "baseline", tmp_path / "baseline")
    path = tmp_path / "baseline" / "last.pt"
    state = checkpoint.load(path)
    state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)
    checkpoint.save(path, state)
    with pytest.raises(CheckpointError, match=rf"{path} .* the optimizer's momentum_buffer has the shape \(3,\) for"):
        train(recipe(tmp_path).for_role("baseline"), resume=True)


def test_data_that_has_changed_is_another_run(runs, tmp_path, monkeypatch):
    """The settings are the same, but the files hold more images, or other classes."""
    shutil.copytree(runs / "baseline", tmp_path / "baseline")
    path = tmp_path / "baseline" / "last.pt"
    state = checkpoint.load(path)
    checkpoint.save(path, {**state, "step": 8, "epoch": 2})
    with pytest.raises(ConfigError, match=f"{path} belongs to a run with other data: it has done 8 steps, 2 epochs"):
        train(recipe(tmp_path).for_role("baseline"), resume=True)
    checkpoint.save(path, {**state, "classes": state["classes"][::-1]})
    with pytest.raises(ConfigError, match=f"{path} has the classes .*, data.train has"):
        train(recipe(tmp_path).for_role("baseline"), resume=True)


@pytest.mark.parametrize("role", ["baseline", "distilled"])
def test_a_finished_run_is_lengthened(runs, tmp_path, capsys, role):
    shutil.copytree(runs / role, tmp_path / role)
    longer = "train.epochs=4", f"teacher.weights={runs}/teacher/last.pt"
    result = train(recipe(tmp_path, *longer).for_role(role), resume=True)
    shown = capsys.readouterr().out
    assert "lengthened from 2 to 4 epochs; the cosine of the learning rate is over all 4: it is 0.005 now" in shown
    assert ("; the linear schedule of the distillation is over all 4, too" in shown) == (role == "distilled")
    last = checkpoint.load(tmp_path / role / "last.pt")
    assert (last["epoch"], last["step"], last["config"]["train"]["epochs"]) == (4, 12, 4)
    assert last["task"]["schedule"]["total_epochs"] == 4
    assert result.metrics == last["metrics"]
    table = (tmp_path / role / "train.csv").read_text().splitlines()
    assert [int(row.split(",")[1]) for row in table[1:]] == list(range(1, 13))
    assert [float(row.split(",")[2]) for row in table[7:9]] == pytest.approx([0.005, 0.0037059], rel=1e-4)
    assert yaml.safe_load((tmp_path / role / "config.yaml").read_text())["train"]["epochs"] == 4
    with pytest.raises(ConfigError, match=r"other settings: train.epochs \(4 -> 2\)"):
        train(recipe(tmp_path, "train.epochs=2", *longer[1:]).for_role(role), resume=True)


def test_a_resumed_run_that_has_nothing_to_do_leaves_no_empty_file(runs, tmp_path):
    shutil.copytree(runs / "baseline", tmp_path / "baseline")
    before = sorted(path.name for path in (tmp_path / "baseline").rglob("*"))
    train(recipe(tmp_path).for_role("baseline"), resume=True)
    assert sorted(path.name for path in (tmp_path / "baseline").rglob("*")) == before
