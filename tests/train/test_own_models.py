"""Detectors that a recipe names as package.module:function."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tardkd import cli
from tardkd.train import checkpoint
from tardkd.train.config import ConfigError, parse_config
from tardkd.train.export import export
from tardkd.train.models import ModelSpec, build_model
from tardkd.train.own_models import OwnModelError

from .recipe import tree

CODE = """
from detectors.tiny import tiny_detector

def small(num_classes):
    return tiny_detector(num_classes=num_classes)

def large(num_classes):
    return tiny_detector(num_classes=num_classes, channels=12)

def without_background(num_classes):
    return tiny_detector(num_classes=num_classes + 1)

def nothing(num_classes):
    return None

def broken(num_classes):
    raise KeyError("depth")

def a_layer(num_classes):
    import torch
    return torch.nn.Linear(2, num_classes)

constant = 3
"""
names = (f"own_detectors_{number}" for number in itertools.count())


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of that name in the current folder, where no path leads to."""
    name = next(names)  # Python would remember an earlier one
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TARDKD_MODELS", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return name


def recipe_file(module: str) -> str:
    parts = tree(Path("runs"))
    parts["data"]["train"] = 4
    parts["train"]["epochs"] = 1
    parts["student"] = {"model": f"{module}:small"}
    parts["teacher"]["model"] = {"model": f"{module}:large"}
    Path("my.yaml").write_text(yaml.safe_dump(parts))
    return "my.yaml"


def test_a_function_builds_the_detector(module: str) -> None:
    model = build_model(ModelSpec(model=f"{module}:small"), 3)
    assert model.roi_heads.box_predictor.cls_score.out_features == 4
    assert ModelSpec(model=f"{module}:small").title == f"{module}:small"


def test_a_recipe_trains_with_two_of_them(module: str, capsys: pytest.CaptureFixture) -> None:
    """All three roles, resumed, and examined by the doctor."""
    config = recipe_file(module)
    for role in ("teacher", "baseline", "distilled"):
        assert cli.main(["train", "--config", config, "--role", role]) == 0
    assert cli.main(["train", "--config", config, "--role", "distilled", "--resume"]) == 0
    stored = checkpoint.load(Path("runs/distilled/last.pt"))["config"]
    assert stored["student"]["model"] == f"{module}:small"
    cli.main(["doctor", "--config", config, "--role", "distilled", "--images", "2"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "100.0% of its parameters" in printed and "the teacher gets none" in printed


def test_a_checkpoint_runs_no_code_that_its_reader_has_not_named(
    module: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe_file(module)
    assert cli.main(["train", "--config", config, "--role", "baseline"]) == 0
    for command in (["eval", "runs/baseline"], ["export", "runs/baseline", "--out", "student.ts"]):
        capsys.readouterr()
        assert cli.main(command) == 2
        assert f"if you trust that module, name it: TARDKD_MODELS={module}" in capsys.readouterr().err
    teacher = f"teacher={{weights: runs/baseline/last.pt, model: {{model: '{module}:large'}}}}"
    assert cli.main(["train", "--config", config, "--role", "distilled", teacher]) == 2  # it is not that one
    assert "A checkpoint runs no code by itself" in capsys.readouterr().err
    named = f"teacher={{weights: runs/baseline/last.pt, model: {{model: '{module}:small'}}}}"
    assert cli.main(["train", "--config", config, "--role", "distilled", named]) == 0
    monkeypatch.setenv("TARDKD_MODELS", f"other,{module}")
    assert cli.main(["eval", "runs/baseline"]) == 0
    text = export("runs/baseline/last.pt", "student.pt")
    assert f"for {module}.small(7)" in text
    weights = torch.load("student.pt", weights_only=True)
    build_model(ModelSpec(model=f"{module}:small"), 6).load_state_dict(weights)


@pytest.mark.parametrize(
    "reference, message",
    [
        ("{module}:missing", "{module} has no function missing"),
        ("{module}:constant", "{module} has no function constant"),
        ("no_such_module:small", "there is no module no_such_module in the current folder"),
        ("{module}:nothing", r"must return a detector \(an nn.Module\), got NoneType"),
        ("{module}:broken", r"{module}:broken\(4\) failed: KeyError: 'depth'"),
        ("{module}:a_layer", "no adapter for a detector of type torch.nn.*Linear"),
        ("{module}:without_background", "built a detector of 4 classes beside the background, but the data has 3"),
    ],
)
def test_what_is_wrong_with_a_function_is_said(module: str, reference: str, message: str) -> None:
    with pytest.raises(OwnModelError, match=message.format(module=module)):
        build_model(ModelSpec(model=reference.format(module=module)), 3)


def test_a_module_that_cannot_be_imported(module: str) -> None:
    Path("faulty_detectors.py").write_text("1 / 0")
    with pytest.raises(OwnModelError, match="faulty_detectors cannot be imported: ZeroDivisionError"):
        build_model(ModelSpec(model="faulty_detectors:small"), 3)


@pytest.mark.parametrize(
    "student, message",
    [
        ({"model": "no_colon"}, "student.model: String should match pattern"),
        ({"model": "os:system; x"}, "student.model: String should match pattern"),
        ({"model": "a.b:c", "min_size": 64}, "min_size: a.b:c builds the detector, so that it decides these"),
        ({"model": "a.b:c", "name": "fasterrcnn_resnet50_fpn"}, "name: a.b:c builds the detector"),
        ({"model": "a.b:c", "weights": "DEFAULT"}, "torchvision has no DEFAULT weights for a.b:c"),
    ],
)
def test_settings_that_do_not_go_with_it(student: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**tree(tmp_path), "student": student}, source="test recipe")


def test_weights_and_frozen_norms_go_with_it(module: str, tmp_path: Path) -> None:
    before = build_model(ModelSpec(model=f"{module}:small"), 3)
    torch.save(before.state_dict(), tmp_path / "w.pt")
    spec = ModelSpec(model=f"{module}:small", weights=str(tmp_path / "w.pt"), freeze_norm=True)
    after = build_model(spec, 3)
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())
