"""Recipes that the doctor is to examine."""

from __future__ import annotations

import pytest
import torch
from train.recipe import tree

from tardkd.data.scenes import write_scenes
from tardkd.doctor import teacher
from tardkd.train.models import ModelSpec, build_model

from .reports import doctor


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A teacher of the tiny recipe that has learned nothing."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.manual_seed(0)
    torch.save(build_model(ModelSpec(**tree(path)["teacher"]["model"]), 6).state_dict(), path)
    return f"teacher.weights={path}"


@pytest.fixture
def no_standards(monkeypatch):
    """Lets the untrained teacher pass: the tests have no time to train one."""
    monkeypatch.setattr(teacher, "LEAST_AP", 0.0)


@pytest.fixture(scope="module")
def sound(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "LEAST_AP", 0.0)
        report = doctor(folder, weights)
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]  # nothing is left behind
    return report


@pytest.fixture
def coco(tmp_path) -> dict:
    """The scenes as files, to be broken; and the data section of a recipe for them."""
    write_scenes(tmp_path / "data", splits={"train": 4, "val": 2}, image_size=64, seed=0)
    return {
        "data": {
            "kind": "coco",
            "root": str(tmp_path / "data"),
            **{split: {"images": "images", "annotations": f"annotations/{split}.json"} for split in ("train", "val")},
        }
    }
