from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tardkd.distill import DistillSettings
from tardkd.train.config import ConfigError, load_config, parse_config

from .recipe import MODEL, recipe, tree


def change(path: str, value) -> dict:
    """The tiny recipe with one key set; the value `...` removes it."""
    changed = tree(Path("runs/x"))
    *parents, last = path.split(".")
    section = changed
    for name in parents:
        section = section.setdefault(name, {})
    if value is ...:
        del section[last]
    else:
        section[last] = value
    return changed


WRONG = [  # key, value, what the message must say
    ("optimizer.lrr", 0.1, "recipe: optimizer.lrr: unknown key; did you mean lr?"),
    ("nonsense", 1, "recipe: nonsense: unknown key; known keys here: augment, data, distill, optimizer"),
    ("train.epochs", 0, "recipe: train.epochs: Input should be greater than 0, got 0"),
    ("train.epochs", "many", "recipe: train.epochs: Input should be a valid integer"),
    ("train.epochs", ..., "recipe: train.epochs: required, but not given"),
    ("train.amp", "fp8", "recipe: train.amp: Input should be 'none', 'bf16' or 'fp16', got 'fp8'"),
    ("train.batch_size", 1.5, "recipe: train.batch_size: Input should be a valid integer"),
    ("data.kind", "yolo", "recipe: data: Input tag 'yolo' found using 'kind' does not match"),
    ("data.trian", 3, "recipe: data.trian: unknown key; did you mean train?"),
    ("data.image_size", -1, "recipe: data.image_size: Input should be greater than 0, got -1"),
    ("augment.scale", [1.2, 0.8], "scale must be [smallest, largest], got [1.2, 0.8]"),
    ("augment.flip", 2, "recipe: augment.flip: Input should be less than or equal to 1, got 2"),
    ("optimizer.schedule", "multistep", "got schedule multistep and milestones []"),
    ("optimizer.milestones", [3], "got schedule cosine and milestones [3]"),
    ("optimizer.lr", -1, "recipe: optimizer.lr: Input should be greater than 0, got -1"),
    ("student.name", "yolo", "recipe: student.name: Input should be 'resnet_fpn'"),
    ("student.depth", 3, "recipe: student.depth: unknown key"),
    ("student.anchor_sizes", [8], "anchor_sizes must have one size per pyramid level"),
    ("teacher", None, "there is no teacher section"),
    ("teacher.model.widht", 1, "recipe: teacher.model.widht: unknown key; did you mean width?"),
    ("distill.featur", 1.0, "recipe: distill.featur: unknown key; did you mean feature?"),
    ("distill.feature", -1, "Distill.feature is -1"),
    ("distill.feature", "x", "recipe: distill.feature: Input should be a valid number"),
    ("distill.classification_gate", "always", "recipe: distill.classification_gate: Input should be 'all', "),
    ("distill.schedule", {"kind": "bumpy"}, "recipe: distill.schedule.kind: Input should be 'linear', "),
    ("distill.schedule", {"when": 1}, "recipe: distill.schedule.when: unknown key; known keys here: gamma, kind"),
    ("output", 3, "recipe: output: Input should be a valid string"),
    ("output", "a\0b", "recipe: output: must be a text of whole characters without NUL, got 'a\\x00b'"),
    ("output", "a\ud800", "recipe: output: must be a text of whole characters without NUL"),
    ("student.weights", "a\0b", "recipe: student.weights: must be a text of whole characters without NUL"),
    ("train.threads", 10**6, "recipe: train.threads: Input should be less than or equal to 1024"),
    ("train.workers", 10**6, "recipe: train.workers: Input should be less than or equal to 1024"),
    ("train.seed", 10**30, "recipe: train.seed: Input should be less than 9223372036854775808"),
    ("data.seed", 2**63, "recipe: data.seed: Input should be less than 9223372036854775808"),
    ("data.image_size", 10**9, "recipe: data.image_size: Input should be less than or equal to 16384"),
    ("train.epochs", 10**30, "recipe: train.epochs: Input should be less than or equal to 1000000000"),
    ("student.max_size", 10**30, "recipe: student.max_size: Input should be less than or equal to 16384"),
    ("student.width", float("inf"), "recipe: student.width: Input should be a finite number"),
    ("student.fpn_channels", 10**12, "recipe: student.fpn_channels: Input should be less than or equal to 16384"),
    ("augment.zoom_out", 1e300, "recipe: augment.zoom_out: Input should be less than or equal to 16"),
]


@pytest.mark.parametrize("key, value, message", WRONG, ids=[f"{key}={value}" for key, value, _ in WRONG])
def test_a_wrong_key_or_value_is_named(key, value, message):
    with pytest.raises(ConfigError) as error:
        parse_config(change(key, value), source="recipe")
    assert message in str(error.value)


def test_all_problems_are_reported_at_once():
    broken = change("optimizer.lr", -1)
    broken["train"]["epochs"] = 0
    with pytest.raises(ConfigError) as error:
        parse_config(broken, source="recipe")
    assert len(str(error.value).splitlines()) == 2


def test_overrides_reach_every_kind_of_section():
    config = recipe(
        Path("runs/x"),
        "optimizer.lr=1e-4",
        "student.width=0.5",
        "data.train=9",
        "distill.enabled=false",
        "distill.schedule.kind=cosine",
        "augment.scale=[0.5, 2]",
        "train.amp=bf16",
        "teacher=null",
        "optimizer.clip_norm=null",
    )
    assert config.optimizer.lr == 1e-4 and config.student.width == 0.5 and config.data.train == 9
    assert not config.distill.enabled and config.distill.schedule.kind == "cosine"
    assert config.augment.scale == (0.5, 2) and config.train.amp == "bf16"
    assert config.teacher is None and config.optimizer.clip_norm is None
    assert isinstance(config.distill, DistillSettings)


@pytest.mark.parametrize(
    "override, message",
    [
        ("optimizer.lr", "override 'optimizer.lr' must have the form section.key=value"),
        ("=3", "override '=3' must have the form"),
        ("optimizer..lr=3", "must have the form"),
        ("optimizer.lr=[1", "the value is not valid YAML"),
        ("optimizer.lr.x=1", "lr is not a section"),
        ("optimizer.lr=-3", "override: optimizer.lr: Input should be greater than 0, got -3"),
        ("optimizer.learning_rate=3", "override: optimizer.learning_rate: unknown key"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(ConfigError) as error:
        recipe(Path("runs/x"), override)
    assert message in str(error.value)


def test_the_file_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    with pytest.raises(ConfigError, match="cannot read the configuration .*recipe.yaml: No such file"):
        load_config(path)
    for text, message in {
        "a: [1": "is not valid YAML",
        "- 1": "must hold a mapping of sections, got list",
        "train: {epochs: 1, epochs: 2}": "key 'epochs' is given twice",
        "!!python/object:os.system {}": "is not valid YAML",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=message) as error:
            load_config(path)
        assert str(path) in str(error.value)


def test_a_configuration_survives_being_written_out(tmp_path):
    config = recipe(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.plain()))
    assert load_config(path) == config


def test_yaml_merge_keys_share_settings(tmp_path):
    path = tmp_path / "config.yaml"
    text = yaml.safe_dump({**tree(tmp_path), "teacher": None, "student": None, "distill": {"enabled": False}})
    path.write_text(text.replace("student: null", f"student: {{<<: {MODEL}, width: 0.5}}"))
    assert load_config(path).student.width == 0.5


def test_roles(tmp_path):
    config = recipe(tmp_path)
    teacher, baseline, distilled = (config.for_role(role) for role in ("teacher", "baseline", "distilled"))
    assert teacher.student == config.teacher.model and teacher.teacher is None and not teacher.distill.enabled
    assert baseline.student == config.student and baseline.teacher is None and not baseline.distill.enabled
    assert distilled.student == config.student and distilled.distill.enabled
    assert distilled.teacher.weights == f"{tmp_path}/teacher/last.pt"
    assert [run.output for run in (teacher, baseline, distilled)] == [
        f"{tmp_path}/{role}" for role in ("teacher", "baseline", "distilled")
    ]
    # What the three share is the same in all.
    assert teacher.train == baseline.train == distilled.train and teacher.optimizer == distilled.optimizer
    own = recipe(tmp_path, "teacher.weights=mine.pt").for_role("distilled")
    assert own.teacher.weights == "mine.pt"


def test_roles_need_their_parts(tmp_path):
    alone = recipe(tmp_path, "teacher=null", "distill.enabled=false")
    with pytest.raises(ConfigError, match="role teacher needs teacher.model"):
        alone.for_role("teacher")
    with pytest.raises(ConfigError, match="role distilled needs a teacher section"):
        alone.for_role("distilled")
