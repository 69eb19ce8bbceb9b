"""A new run from the weights of another."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml

from tardkd import cli
from tardkd.train import checkpoint
from tardkd.train.build import build_dataset, build_distiller, start_from
from tardkd.train.loop import train

from .recipe import recipe, tree


@pytest.fixture
def command(tmp_path):
    """``tardkd train`` of the baseline, into ``tmp_path/new``."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree(tmp_path / "new")))
    return ["train", "--config", str(file), "--role", "baseline", "train.epochs=1", "data.train=2"]


def assert_first_weights(config, source):
    student = build_distiller(config, build_dataset(config, "val").class_names).student
    torch.testing.assert_close(student.state_dict(), checkpoint.load(source)["model"], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["folder", "best.pt", "plain.pt", "plain.safetensors"])
def test_a_new_run_starts_from_the_weights(runs, tmp_path, command, kind):
    source = runs / "baseline"
    given = {"folder": source, "best.pt": source / "best.pt"}.get(kind, tmp_path / kind)
    weights = source / ("best.pt" if kind == "best.pt" else "last.pt")
    if kind.startswith("plain"):
        if kind.endswith("safetensors"):
            pytest.importorskip("safetensors")
        assert cli.main(["export", str(source), "--out", str(given)]) == 0
    assert cli.main([*command, "--init-from", str(given)]) == 0
    state = checkpoint.load(tmp_path / "new" / "baseline" / "last.pt")
    assert (state["epoch"], state["step"]) == (1, 1)  # not 2 epochs and 6 steps on
    used = yaml.safe_load((tmp_path / "new" / "baseline" / "config.yaml").read_text())["student"]["weights"]
    assert used == str(weights if kind == "folder" else given)
    assert_first_weights(start_from(recipe(tmp_path).for_role("baseline"), used), weights)


def test_it_takes_the_place_of_the_recipes_own(runs, tmp_path, command):
    torch.save({"w": torch.ones(1)}, tmp_path / "classifier.pt")
    extra = f"student.backbone_weights={tmp_path}/classifier.pt"
    assert cli.main([*command, extra, "--init-from", str(runs / "baseline")]) == 0


def test_the_teachers_training_can_start_from_weights_too(runs, tmp_path, command):
    command[command.index("baseline")] = "teacher"
    assert cli.main([*command, "--init-from", str(runs / "teacher")]) == 0
    state = checkpoint.load(tmp_path / "new" / "teacher" / "last.pt")
    assert state["config"]["student"]["weights"] == str(runs / "teacher" / "last.pt")


def test_it_resumes_without_the_weights_it_began_with(runs, tmp_path, command):
    shutil.copytree(runs / "baseline", tmp_path / "old")
    assert cli.main([*command, "--init-from", str(tmp_path / "old")]) == 0
    shutil.rmtree(tmp_path / "old")
    assert cli.main([*command, "--resume"]) == 0
    resumed = start_from(recipe(tmp_path / "new", "train.epochs=1", "data.train=2").for_role("baseline"), "gone.pt")
    train(resumed, resume=True)


def test_a_recipes_new_head_is_for_weights_of_other_classes(runs, tmp_path, command):
    """Else a run that goes on with its own weights would lose the head that it has trained."""
    assert cli.main([*command, "student.new_head=true", "--init-from", str(runs / "baseline")]) == 0
    config = recipe(tmp_path, "student.new_head=true").for_role("baseline")
    assert_first_weights(start_from(config, str(runs / "baseline" / "last.pt")), runs / "baseline" / "last.pt")


@pytest.mark.parametrize("classes", [["cat", "ball", "board", "parcel", "sign", "star"], ["cat"]])
def test_other_classes_are_refused_unless_the_head_is_new(runs, tmp_path, command, capsys, classes):
    state = checkpoint.load(runs / "baseline" / "last.pt")
    assert state["classes"] != classes
    checkpoint.save(tmp_path / "other.pt", {**state, "classes": classes})
    given = [*command, "--init-from", str(tmp_path / "other.pt")]
    assert cli.main(given) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path}/other.pt has the classes {classes}, the data set has {state['classes']}" in error
    assert "student.new_head=true takes all but the class and box predictor" in error
    assert not (tmp_path / "new").exists()
    assert cli.main([*given, "student.new_head=true"]) == 0


def test_mistakes(runs, tmp_path, command, capsys):
    for extra, message in (
        (["--init-from", str(runs / "baseline"), "--resume"], "--init-from starts a new run and --resume goes on"),
        (["--init-from", str(tmp_path / "none")], f"there is no checkpoint at {tmp_path}/none"),
        (["--init-from", str(runs / "teacher")], "do not fit"),
        (["--init-from", str(runs / "baseline"), f"output={runs}"], "is in use"),
    ):
        assert cli.main([*command, *extra]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
