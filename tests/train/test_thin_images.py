"""Images of which a detector's resizing leaves nothing are found before the first step, and named."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tardkd import cli
from tardkd.data.scenes import write_scenes
from tardkd.train.config import parse_config
from tardkd.train.loop import train
from tardkd.train.update import Update

from .recipe import recipe, tree


@pytest.fixture
def description(tmp_path):
    """A recipe on files, of whose second training image only one row is there."""
    write_scenes(tmp_path / "data", splits={"train": 6, "val": 2}, image_size=64, seed=0)
    path = tmp_path / "data/annotations/train.json"
    annotations = json.loads(path.read_text())
    annotations["images"][1] |= {"width": 5000, "height": 1}
    annotations["annotations"] = [one for one in annotations["annotations"] if one["image_id"] != 2]
    path.write_text(json.dumps(annotations))
    Image.new("RGB", (5000, 1)).save(tmp_path / "data/images" / annotations["images"][1]["file_name"])
    split = {name: {"images": "images", "annotations": f"annotations/{name}.json"} for name in ("train", "val")}
    data = {"kind": "coco", "root": str(tmp_path / "data"), **split, "test": split["train"]}
    return {**tree(tmp_path), "data": data}


def test_a_thin_image_is_named_before_the_first_step(description, tmp_path, capsys):
    config = parse_config(description, ["train.epochs=1"], source="recipe").for_role("baseline")
    with pytest.raises(ValueError, match=r"image id 2: image .*train_00002.png is 5000x1, too thin"):
        train(config)
    assert not (tmp_path / "baseline").exists()
    skipping = ["train.epochs=1", "data.on_bad_image=skip"]
    with pytest.warns(UserWarning, match="too thin"):
        train(parse_config(description, skipping, source="recipe").for_role("baseline"))
    command = ["eval", str(tmp_path / "baseline"), "--split", "test"]
    assert cli.main([*command, "data.on_bad_image=error"]) == 2
    assert "image id 2: image " in capsys.readouterr().err
    with pytest.warns(UserWarning, match="too thin.*; it counts as an image without detections"):
        assert cli.main(command) == 0


def test_an_error_inside_a_step_names_its_images(tmp_path, monkeypatch):
    """Whatever it is, such as too little memory."""

    def fail(self, number, parts):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Update, "gradients", fail)
    with pytest.raises(RuntimeError, match="out of memory") as error:
        train(recipe(tmp_path).for_role("baseline"))
    assert not hasattr(error.value, "add_note") or error.value.__notes__[0].startswith("at step 1, images ")
