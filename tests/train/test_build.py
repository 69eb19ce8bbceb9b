from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tardkd.data.scenes import write_scenes
from tardkd.distill import Distiller
from tardkd.train import build
from tardkd.train.build import build_dataset, load_teacher
from tardkd.train.config import ConfigError, Teacher, load_config, parse_config
from tardkd.train.loop import train
from tardkd.train.models import ModelSpec, build_model

from .recipe import MODEL, recipe, tree

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_complete_and_its_models_pair(path):
    with pytest.raises(ConfigError, match=r"data.root: required, but not given"):
        load_config(path)
    config = load_config(path, ["data.root=data"])
    roles = ["baseline", "distilled"] + (["teacher"] if config.teacher.weights is None else [])
    for role in roles:
        assert config.for_role(role).output == f"runs/{path.stem}/{role}"

    def bare(spec: ModelSpec) -> torch.nn.Module:
        with torch.device("meta"):
            return build_model(spec.model_copy(update={"weights": None, "backbone_weights": None}), 6)

    student, teacher = bare(config.student), bare(config.teacher.model)
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in (("s", student), ("t", teacher))}
    assert count["s"] < count["t"]
    Distiller(student, teacher, config.distill)


def test_splits_differ_and_only_training_is_augmented(tmp_path):
    config = recipe(tmp_path, "data.train=2")
    first = {split: build_dataset(config, split)[0][0] for split in ("train", "val", "test")}
    assert not torch.equal(first["train"], first["val"]) and not torch.equal(first["val"], first["test"])
    assert build_dataset(config, "val").transform is None
    assert build_dataset(config, "train", augment=True).transform is not None
    with pytest.raises(ConfigError, match="data.test: required here, but not given"):
        build_dataset(recipe(tmp_path, "data.test=null"), "test")


CATEGORIES = ["__background__", "person", "N/A", "cat", "dog"]


@pytest.fixture
def published(monkeypatch):
    """Stands for torchvision's downloads: a detector of five outputs, one of them unused."""
    torch.manual_seed(1)
    state = build_model(ModelSpec(**MODEL), len(CATEGORIES) - 1).state_dict()
    weights = SimpleNamespace(
        meta={"categories": CATEGORIES},
        get_state_dict=lambda progress: {name: value.clone() for name, value in state.items()},
    )
    monkeypatch.setattr(build, "get_model_weights", lambda name: SimpleNamespace(DEFAULT=weights))
    return state


def test_torchvisions_head_is_cut_down_to_the_classes_by_name(published):
    teacher = Teacher(weights="DEFAULT", model=ModelSpec(**MODEL))
    model, classes = load_teacher(teacher, ["dog", "person"])
    assert classes == ["dog", "person"]
    own, head = model.state_dict(), "roi_heads.box_predictor."
    assert torch.equal(own[head + "cls_score.weight"], published[head + "cls_score.weight"][[0, 4, 1]])
    assert torch.equal(own[head + "cls_score.bias"], published[head + "cls_score.bias"][[0, 4, 1]])
    columns = [0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7]
    assert torch.equal(own[head + "bbox_pred.weight"], published[head + "bbox_pred.weight"][columns])
    assert torch.equal(own[head + "bbox_pred.bias"], published[head + "bbox_pred.bias"][columns])
    for name in own:
        assert name.startswith(head) or torch.equal(own[name], published[name])


def test_torchvision_teaches_what_it_knows(published):
    teacher = Teacher(weights="DEFAULT", model=ModelSpec(**MODEL), classes={"person": "pedestrian"})
    assert load_teacher(teacher, ["star", "cat", "pedestrian"])[1] == ["cat", "person"]
    teacher = Teacher(weights="DEFAULT", model=ModelSpec(**MODEL))
    with pytest.raises(ConfigError, match="resnet_fpn knows none of the classes star, parcel"):
        load_teacher(teacher, ["star", "parcel"])
    with pytest.raises(ConfigError, match="teacher.model: required"):
        load_teacher(Teacher(weights="DEFAULT"), ["cat"])


@pytest.mark.parametrize(
    "without, message", [("images", "data.val has no images"), ("annotations", "data.val holds no object")]
)
def test_nothing_to_evaluate_is_said_before_the_training(tmp_path, without, message):
    write_scenes(tmp_path, splits={"train": 3, "val": 2}, image_size=64, seed=0)
    path = tmp_path / "annotations" / "val.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), without: [], "annotations": []}))
    data = {
        "kind": "coco",
        "root": str(tmp_path),
        **{split: {"images": "images", "annotations": f"annotations/{split}.json"} for split in ("train", "val")},
    }
    config = parse_config({**tree(tmp_path / "out"), "data": data}, source="recipe").for_role("baseline")
    with pytest.raises(ConfigError, match=message):
        train(config)
    assert not (tmp_path / "out").exists()


def test_an_image_that_cannot_be_read_is_replaced_in_training_alone(tmp_path):
    """An evaluation that saw its stand-in would count that one twice."""
    write_scenes(tmp_path, splits={"train": 3, "val": 2}, image_size=64, seed=0)
    (first, *_) = sorted((tmp_path / "images").glob("train*"))
    first.write_bytes(b"")
    split = {"images": "images", "annotations": "annotations/train.json"}
    data = {"kind": "coco", "root": str(tmp_path), "train": split, "val": split, "on_bad_image": "skip"}
    config = parse_config({**tree(tmp_path / "out"), "data": data}, source="recipe").for_role("baseline")
    with pytest.warns(UserWarning, match="the next good one"):
        assert build_dataset(config, "train", augment=True)[0][1]["image_id"] == 2
    for chosen in ("train", "val"):
        with pytest.warns(UserWarning, match="without detections"):
            assert build_dataset(config, chosen)[0][1]["unreadable"]
