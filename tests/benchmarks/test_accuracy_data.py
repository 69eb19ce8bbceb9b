"""The data sets made small: boxes follow their images, and a validation split is held out where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from accuracy.data import DataSet, open_split, prepare
from accuracy.models import Geometry
from PIL import Image

GEOMETRY = Geometry(short=30, long=60, anchors=(4, 8, 16, 32, 64), canonical=16)


def write_data(root: Path, splits: dict[str, int]) -> None:
    """Images 80x60, each with one box of (8, 6, 40, 30)."""
    (root / "tiny" / "images").mkdir(parents=True)
    (root / "tiny" / "annotations").mkdir()
    first = 1
    for split, count in splits.items():
        ids = range(first, first + count)
        first += count
        for i in ids:
            Image.new("RGB", (80, 60), (i, 0, 0)).save(root / "tiny" / "images" / f"{i:03}.png")
        content = {
            "images": [{"id": i, "file_name": f"{i:03}.png", "width": 80, "height": 60} for i in ids],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 7, "bbox": [8, 6, 40, 30], "area": 1200, "iscrowd": 0}
                for i in ids
            ],
            "categories": [{"id": 7, "name": "thing"}],
        }
        (root / "tiny" / "annotations" / f"{split}.json").write_text(json.dumps(content))


def test_images_and_boxes_shrink_together(tmp_path):
    write_data(tmp_path, {"train": 2, "val": 1, "test": 1})
    data = DataSet("tiny", GEOMETRY, augment={}, val="val", epochs=1)
    folder = prepare(data, tmp_path, tmp_path / "cache")
    image, target = open_split(data, folder, "test")[0]
    assert tuple(image.shape) == (3, 30, 40)
    assert target["boxes"].tolist() == [[4, 3, 24, 18]]
    assert [len(open_split(data, folder, split)) for split in ("train", "val", "test")] == [2, 1, 1]


def test_every_fifth_training_image_is_held_out_where_there_is_no_validation_split(tmp_path):
    write_data(tmp_path, {"train": 11, "test": 1})
    data = DataSet("tiny", GEOMETRY, augment={}, val=None, epochs=1)
    folder = prepare(data, tmp_path, tmp_path / "cache")
    ids = {
        split: {open_split(data, folder, split)[i][1]["image_id"] for i in range(n)}
        for split, n in (("train", 8), ("val", 3))
    }
    assert ids == {"train": {2, 3, 4, 5, 7, 8, 9, 10}, "val": {1, 6, 11}}


def test_what_is_prepared_is_not_made_again(tmp_path):
    write_data(tmp_path, {"train": 5, "test": 1})
    data = DataSet("tiny", GEOMETRY, augment={}, val=None, epochs=1)
    folder = prepare(data, tmp_path, tmp_path / "cache")
    for path in (tmp_path / "tiny" / "images").iterdir():
        path.unlink()
    assert prepare(data, tmp_path, tmp_path / "cache") == folder


def test_a_preparation_that_was_interrupted_begins_anew(tmp_path):
    write_data(tmp_path, {"train": 5, "test": 1})
    data = DataSet("tiny", GEOMETRY, augment={}, val=None, epochs=1)
    missing = tmp_path / "tiny" / "images" / "006.png"
    moved = missing.rename(tmp_path / "006.png")
    with pytest.raises(FileNotFoundError):
        prepare(data, tmp_path, tmp_path / "cache")
    moved.rename(missing)
    assert len(open_split(data, prepare(data, tmp_path, tmp_path / "cache"), "test")) == 1
