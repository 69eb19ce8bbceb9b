from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tardkd.data import CocoDetection, Scenes, write_scenes
from tardkd.data import scenes as scenes_module
from tardkd.data.scenes import CLASSES, draw_scene


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes(60, 128, seed=0)


def test_items(scenes):
    assert len(scenes) == 60 and scenes.class_names == list(CLASSES) and len(scenes.class_names) >= 5
    for image, target in (scenes[i] for i in range(len(scenes))):
        boxes = target["boxes"]
        assert image.shape == (3, 128, 128) and image.dtype == torch.uint8
        assert len(boxes) == len(target["labels"]) == len(target["area"]) > 0
        assert (boxes >= 0).all() and (boxes <= 128).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert (target["area"] <= (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)).all()


def test_scenes_vary(scenes):
    labels = torch.cat([scenes[i][1]["labels"] for i in range(60)])
    counts = labels.bincount(minlength=7)[1:]
    assert counts.min() > 0.5 * counts.float().mean()
    areas = torch.cat([scenes[i][1]["area"] for i in range(60)])
    assert (areas < 16**2).float().mean() > 0.1
    assert (areas > 32**2).float().mean() > 0.2
    assert len({image.numpy().tobytes() for image in (scenes[i][0] for i in range(60))}) == 60


def test_colour_does_not_tell_the_class(scenes):
    """The mean colours of the classes' boxes are alike: no channel separates any two classes."""
    means = {label: [] for label in range(1, 7)}
    for image, target in (scenes[i] for i in range(60)):
        for (x1, y1, x2, y2), label in zip(target["boxes"].int().tolist(), target["labels"].tolist(), strict=True):
            means[label].append(image[:, y1:y2, x1:x2].float().mean(dim=(1, 2)))
    centres = torch.stack([torch.stack(colours).mean(dim=0) for colours in means.values()])
    within = torch.stack([torch.stack(colours).std(dim=0) for colours in means.values()]).mean(dim=0)
    assert ((centres.amax(dim=0) - centres.amin(dim=0)) < within).all()


def test_boxes_are_tight_around_what_shows(monkeypatch):
    stages = []
    photograph = scenes_module._Stage.photograph
    monkeypatch.setattr(
        scenes_module._Stage, "photograph", lambda stage, rng: (stages.append(stage), photograph(stage, rng))[1]
    )
    for index in range(60):
        scene, stage = draw_scene(1, "train", index, 64), stages.pop()
        shown = [stage.owner == number for number in range(len(stage.labels))]
        assert [int(mask.sum()) for mask in shown] == stage.visible  # the running count is the map's
        objects = [number for number, label in enumerate(stage.labels) if label]
        assert scene.areas == [stage.visible[number] for number in objects]
        assert all(5 * stage.visible[number] >= 3 * stage.areas[number] > 0 for number in objects)
        for (x, y, w, h), number in zip(scene.boxes, objects, strict=True):
            assert not np.delete(shown[number], np.s_[y : y + h], axis=0).any()
            assert not np.delete(shown[number], np.s_[x : x + w], axis=1).any()
            inside = shown[number][y : y + h, x : x + w]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_same_seed_same_pixels():
    """Pinned: these pixels and boxes are the same on every machine."""
    digest = hashlib.sha256()
    for index in range(6):
        scene = draw_scene(0, "train", index, 96 + 17 * index)
        digest.update(scene.image.tobytes())
        digest.update(repr((scene.boxes, scene.labels, scene.areas)).encode())
    assert digest.hexdigest() == "9045ce4889bf93edab43671d242cf1d5b8fcda9afbc66667ab4f8d1b677a2d4d"


def test_an_image_depends_on_seed_split_and_index_alone(scenes):
    assert torch.equal(Scenes(3, 128, seed=0)[2][0], scenes[2][0])
    others = [draw_scene(0, "val", 0, 128), draw_scene(1, "train", 0, 128), draw_scene(0, "train", 1, 128)]
    first = scenes[0][0].permute(1, 2, 0).numpy()
    assert not any(np.array_equal(first, other.image) for other in others)


def test_written_scenes_read_back_the_same(tmp_path):
    write_scenes(tmp_path, splits={"train": 4, "val": 2}, image_size=96, seed=3)
    for split, count in {"train": 4, "val": 2}.items():
        read = CocoDetection(tmp_path / "images", tmp_path / "annotations" / f"{split}.json")
        made = Scenes(count, 96, 3, split=split)
        assert len(read) == count and read.class_names == made.class_names and read.category_ids == made.category_ids
        assert read.coco.dataset == made.coco.dataset and read.sizes == made.sizes
        for (image, target), (image2, target2) in zip(
            (read[i] for i in range(count)), (made[i] for i in range(count)), strict=True
        ):
            assert torch.equal(image, image2)
            assert target.keys() == target2.keys()
            assert all(torch.equal(torch.as_tensor(target[key]), torch.as_tensor(target2[key])) for key in target)
    again = tmp_path / "again"
    write_scenes(again, splits={"train": 4, "val": 2}, image_size=96, seed=3)
    for path in (p.relative_to(again) for p in again.rglob("*.*")):
        assert (again / path).read_bytes() == (tmp_path / path).read_bytes()
    assert json.loads((again / "annotations" / "val.json").read_text())["images"][0]["file_name"] == "val_00001.png"
    assert Image.open(again / "images" / "val_00001.png").size == (96, 96)


def test_transform():
    plain, flipped = Scenes(1, 64, 0), Scenes(1, 64, 0, lambda image, target: (image.flip(-1), target))
    assert torch.equal(plain[0][0].flip(-1), flipped[0][0])


@pytest.mark.parametrize("arguments, message", [((0, 128, 0), "at least 1"), ((1, 63, 0), "at least 64")])
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scenes(*arguments)
