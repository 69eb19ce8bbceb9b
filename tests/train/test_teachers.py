"""Teachers of other classes, other sizes, and several of them, through the configuration and the training loop."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
import yaml

from tardkd import cli
from tardkd.data.scenes import CLASSES
from tardkd.train import checkpoint
from tardkd.train.build import build_dataset, build_distiller
from tardkd.train.config import Config, ConfigError, load_config, parse_config
from tardkd.train.loop import train

from .recipe import MODEL, recipe, teacher_file, tree
from .running import assert_same_weights, interrupted, weights

NAMES = list(CLASSES)
QUICK = ("data.train=4", "data.val=1", "train.epochs=1")


def team(folder: Path, *overrides: str) -> Config:
    """One teacher knows the first two classes, in the other order, the other the third under another name."""
    folder.mkdir(exist_ok=True)
    first = teacher_file(folder / "first.pt", NAMES[1::-1], fpn_channels=16)
    second = teacher_file(folder / "second.pt", ["else", "thing"], min_size=96, max_size=96)
    changed = tree(folder / "out")
    changed["teacher"] = [{"weights": first}, {"weights": second, "classes": {"thing": NAMES[2]}}]
    return parse_config(changed, [*QUICK, *overrides], source="recipe").for_role("distilled")


def test_two_teachers_train_and_resume_exactly(tmp_path, monkeypatch, capsys):
    whole = train(team(tmp_path / "whole", "train.epochs=2"))
    said = capsys.readouterr().out
    assert f"teacher 0 teaches {NAMES[0]}, {NAMES[1]}\n" in said
    assert f"teacher 1 teaches {NAMES[2]} (its 'thing')\n" in said
    assert f"no teacher for {', '.join(NAMES[3:])}\n" in said
    with open(whole.folder / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and any(float(row["distill_feature"]) > 0 for row in rows)
    state = checkpoint.load(whole.folder / "last.pt")
    assert set(state["task"]["adapters"]) == {"feature_0.weight", "feature_0.bias"}  # only the first has other channels
    assert state["classes"] == NAMES

    parts = team(tmp_path / "whole", "train.epochs=2", f"output={tmp_path}/parts")
    interrupted(monkeypatch, parts, epoch=1)
    again = train(parts, resume=True)
    assert_same_weights(weights(whole.folder), weights(again.folder))
    assert load_config(whole.folder / "config.yaml").teacher == team(tmp_path / "whole").teacher


def test_eval_and_export_of_what_two_teachers_taught(tmp_path, capsys):
    folder = train(team(tmp_path)).folder
    assert cli.main(["eval", str(folder)]) == 0
    assert cli.main(["export", str(folder), "--out", str(tmp_path / "student.pt")]) == 0
    assert_same_weights(torch.load(tmp_path / "student.pt", weights_only=True), weights(folder))
    assert f"{len(NAMES)} classes" in capsys.readouterr().out


def test_a_teacher_of_some_classes(tmp_path, capsys):
    path = teacher_file(tmp_path / "teacher.pt", ["else", NAMES[2], "thing", NAMES[0]])
    extra = (f"teacher.weights={path}", f"teacher.classes.thing={NAMES[1]}", "distill.sharing=both")
    train(recipe(tmp_path, *QUICK, *extra).for_role("distilled"))
    assert f"the teacher teaches {NAMES[0]}, {NAMES[1]} (its 'thing'), {NAMES[2]}\n" in capsys.readouterr().out


def test_a_teacher_of_just_these_classes_is_not_worth_a_line(tmp_path, capsys):
    path = teacher_file(tmp_path / "teacher.pt", NAMES)
    train(recipe(tmp_path, *QUICK, f"teacher.weights={path}").for_role("distilled"))
    assert "teaches" not in capsys.readouterr().out


def test_a_teacher_at_another_input_size(tmp_path):
    path = teacher_file(tmp_path / "teacher.pt", NAMES, min_size=96, max_size=96)
    for override, side in ((), 96), (("distill.teacher_input_ratio=0.5",), 32):
        config = recipe(tmp_path, *QUICK, f"teacher.weights={path}", *override).for_role("distilled")
        dataset = build_dataset(config, "train")
        distiller = build_distiller(config, dataset.class_names)
        sizes: list[tuple[int, int]] = []
        distiller.teacher.backbone.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[-2:])))
        image, target = dataset[0]
        losses = distiller([image.float() / 255 if image.dtype == torch.uint8 else image], [target])
        assert sizes == [(side, side)]
        assert all(value.isfinite() for value in losses.values())


def test_another_normalisation(tmp_path):
    """Models of ours all normalise alike; one that does not is given its own view of the images."""
    path = teacher_file(tmp_path / "teacher.pt", NAMES)
    config = recipe(tmp_path, *QUICK, f"teacher.weights={path}").for_role("distilled")
    dataset = build_dataset(config, "train")
    distiller = build_distiller(config, dataset.class_names)
    transform = distiller.teacher.transform
    transform.image_mean, transform.image_std = [0.0] * 3, [1.0] * 3
    seen: list[torch.Tensor] = []
    distiller.teacher.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    image, target = dataset[0]
    image = image.float() / 255 if image.dtype == torch.uint8 else image
    distiller([image], [target])
    assert torch.equal(seen[0][0], image)  # 64 pixels, as the scenes are


# --- the configuration ------------------------------------------------------------------------------------------------


def several(tmp_path: Path, *overrides: str) -> Config:
    changed = tree(tmp_path)
    own = {"model": {**MODEL, "width": 0.25}, "classes": {"cat": "dog", "x": None}}
    changed["teacher"] = [{"weights": "a.pt"}, own]
    return parse_config(changed, overrides, source="recipe")


def test_a_list_of_teachers_survives_being_written_out(tmp_path):
    config = several(tmp_path, "teacher.0.weights=b.pt", "teacher.1.classes.cat=cow", "teacher.1.model.width=0.5")
    assert list(config.teachers) == ["teacher.0", "teacher.1"]
    first, second = config.teachers.values()
    assert first.weights == "b.pt" and second.model.width == 0.5
    assert second.classes == {"cat": "cow", "x": None}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.plain()))
    assert load_config(path) == config


@pytest.mark.parametrize(
    "override, message",
    [
        ("teacher.1.model.widht=1", "override: teacher.1.model.widht: unknown key; did you mean width?"),
        ("teacher.0.weight=a", "override: teacher.0.weight: unknown key; did you mean weights?"),
        ("teacher.0.compile=perhaps", "override: teacher.0.compile: Input should be a valid boolean"),
        ("teacher.1.classes.cat=[1]", "override: teacher.1.classes.cat: Input should be a valid string"),
        ("teacher.2.weights=a", "override 'teacher.2.weights=a': 2 is no place in a list of 2, which count from 0"),
        ("teacher.weights=a", "override 'teacher.weights=a': weights is no place in a list of 2, which count from 0"),
        ("teacher=[]", "override: teacher: Tuple should have at least 1 item"),
        ("teacher=3", "override: teacher: Input should be a valid dictionary or instance of Teacher"),
    ],
)
def test_a_wrong_key_is_named_with_its_teacher(tmp_path, override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        several(tmp_path, override)


def test_roles_of_several(tmp_path):
    """The one without weights is the recipe's own."""
    config = several(tmp_path)
    assert config.for_role("teacher").student == config.teacher[1].model
    assert config.for_role("baseline").teacher is None
    distilled = config.for_role("distilled").teacher
    assert [section.weights for section in distilled] == ["a.pt", f"{tmp_path}/teacher/last.pt"]
    with pytest.raises(ConfigError, match="only one of several .* without weights, and teacher.0, teacher.1 are"):
        several(tmp_path, "teacher.0.weights=null").for_role("distilled")
    with pytest.raises(ConfigError, match="role teacher needs teacher.model in the recipe, and no weights if"):
        several(tmp_path, "teacher.1.weights=b.pt").for_role("teacher")
    with pytest.raises(ConfigError, match="role teacher needs teacher.1.model in the recipe"):
        several(tmp_path, "teacher.1.model=null").for_role("teacher")


def test_a_teacher_of_several_that_cannot_be_loaded_is_named(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="teacher.0.model: required, because .* does not say"):
        build_distiller(several(tmp_path, f"teacher.0.weights={tmp_path}/a.pt"), NAMES)
    first = teacher_file(tmp_path / "a.pt", NAMES)
    with pytest.raises(ConfigError, match="teacher.1.weights: required"):
        build_distiller(several(tmp_path, f"teacher.0.weights={first}"), NAMES)
    both = several(tmp_path, f"teacher.0.weights={first}", f"teacher.1.weights={first}", "teacher.1.classes=null")
    with pytest.raises(ValueError, match=f"several teach {NAMES[0]} \\(teacher 0 and teacher 1\\)"):
        build_distiller(both, NAMES)
