"""Data that changed since a run began: what is not the same is refused by name, before anything is written."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import yaml
from PIL import Image

from tardkd import cli
from tardkd.data import CocoDetection
from tardkd.data.scenes import write_scenes
from tardkd.train import checkpoint
from tardkd.train.config import ConfigError, parse_config
from tardkd.train.loop import train

from .recipe import tree


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of one epoch on files."""
    folder = tmp_path_factory.mktemp("changed")
    write_scenes(folder / "data", splits={"train": 4, "val": 2}, image_size=64, seed=0)
    train(configuration(folder))
    return folder


@pytest.fixture
def run(stopped, tmp_path):
    """The same again for a test to change, with the checkpoint as it was written."""
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def configuration(folder, *overrides):
    split = {name: {"images": "images", "annotations": f"annotations/{name}.json"} for name in ("train", "val")}
    data = {"kind": "coco", "root": str(folder / "data"), **split}
    description = {**tree(folder / "out"), "data": data}
    return parse_config(description, ["train.epochs=1", *overrides], source="recipe").for_role("baseline")


def move_a_box(content):
    content["annotations"][0]["bbox"][0] += 1


def call_it_another_class(content):
    other = content["categories"][1]["id"]
    content["annotations"][0]["category_id"] = other if content["annotations"][0]["category_id"] != other else 1


def leave_out_an_object(content):
    del content["annotations"][-1]


def swap_two_images(content):
    first, second = content["images"][:2]
    first["file_name"], second["file_name"] = second["file_name"], first["file_name"]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("change", [move_a_box, call_it_another_class, leave_out_an_object, swap_two_images])
def test_other_annotations_are_refused(run, split, change):
    path = run / f"data/annotations/{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    before = {file.name: file.read_bytes() for file in (run / "out/baseline").iterdir() if file.is_file()}
    message = (
        f"data.{split} holds other images or annotations than the run began with: .*--init-from {run}/out/baseline"
    )
    with pytest.raises(ConfigError, match=message):
        train(configuration(run, "train.epochs=2"), resume=True)
    assert {file.name: file.read_bytes() for file in (run / "out/baseline").iterdir() if file.is_file()} == before


def test_annotations_that_are_only_written_differently_are_the_same(run):
    """In another order, with other spaces, and with numbers that have a point."""
    for split in ("train", "val"):
        path = run / f"data/annotations/{split}.json"
        content = json.loads(path.read_text())
        content["images"].reverse()
        content["categories"].reverse()
        for annotation in content["annotations"]:
            annotation["bbox"] = [float(number) for number in annotation["bbox"]]
        path.write_text(json.dumps(content, indent=2))
    train(configuration(run, "train.epochs=2"), resume=True)


def test_a_checkpoint_from_before_the_data_were_noted_is_resumed(run):
    state = checkpoint.load(run / "out/baseline/last.pt")
    del state["data"]
    checkpoint.save(run / "out/baseline/last.pt", state)
    train(configuration(run, "train.epochs=2"), resume=True)
    assert checkpoint.load(run / "out/baseline/last.pt")["data"].keys() == {"train", "val"}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda path: path.unlink(), "1 of 4 images of .*train.json are missing, the first: {path}"),
        (lambda path: Image.new("RGB", (8, 64)).save(path), "image {path} is 8x64, its annotation says 64x64"),
        (lambda path: path.write_bytes(path.read_bytes()[:99]), "cannot read image {path}: "),
    ],
    ids=["removed", "of another size", "cut short"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_another_image_is_named(run, capfd, change, message, workers):
    """Whether it is found before the first step or when it is needed; the checkpoint is as it was."""
    path = run / "data/images/train_00002.png"
    change(path)
    config = configuration(run, "train.epochs=2", f"train.workers={workers}")
    (run / "recipe.yaml").write_text(yaml.safe_dump(config.plain()))
    assert cli.main(["train", "--config", str(run / "recipe.yaml"), "--resume"]) == 2
    shown = capfd.readouterr().err
    assert re.search(message.format(path=path), shown) and "Traceback" not in shown
    assert checkpoint.load(run / "out/baseline/last.pt")["epoch"] == 1


def test_the_fingerprint_is_that_of_what_is_learned(stopped):
    def fingerprint(split="train", **changes):
        content = json.loads((stopped / f"data/annotations/{split}.json").read_text())
        content["annotations"][0].update(changes)
        return CocoDetection(stopped / "data/images", content).fingerprint()

    assert fingerprint() == fingerprint(segmentation=[], id=77)
    assert len({fingerprint(), fingerprint("val"), fingerprint(area=1.0), fingerprint(iscrowd=1)}) == 4
