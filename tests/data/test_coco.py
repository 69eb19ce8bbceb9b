from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tardkd.data import CocoDetection
from tardkd.data.coco import check_annotations, read_json

REAL_DATA = Path(os.environ.get("TARDKD_DATA", Path(__file__).parents[2].parent / "shared" / "data"))

GOOD = {
    "images": [
        {"id": 7, "file_name": "sub/a.png", "width": 40, "height": 30},
        {"id": 3, "file_name": "b.png", "width": 20, "height": 20},
    ],
    "annotations": [
        {"id": 0, "image_id": 7, "category_id": 90, "bbox": [30, 20, 20, 5], "area": 70.5, "iscrowd": 0},
        {"id": 1, "image_id": 7, "category_id": 2, "bbox": [1, 2, 3.5, 4], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0, 0, 40, 30], "area": 9, "iscrowd": 1},  # a crowd
        {"id": 3, "image_id": 7, "category_id": 2, "bbox": [5, 5, 0, 4], "area": 0, "iscrowd": 0},  # no width
        {"id": 4, "image_id": 7, "category_id": 2, "bbox": [41, 5, 9, 4], "area": 36, "iscrowd": 0},  # outside
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 2, "name": "bicycle"}],
}


def write(folder: Path, data: object = GOOD) -> tuple[Path, Path]:
    (folder / "images" / "sub").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (1, 2, 3)).save(folder / "images" / "sub" / "a.png")
    Image.new("RGB", (20, 20)).save(folder / "images" / "b.png")
    (folder / "a.json").write_text(json.dumps(data))
    return folder / "images", folder / "a.json"


def changed(path: str, value: object) -> dict:
    """GOOD with one entry replaced, or deleted for ``...``; the path is dotted."""
    data = copy.deepcopy(GOOD)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    entry = data
    for part in parents:
        entry = entry[part]
    if value is ...:
        del entry[last]
    else:
        entry[last] = value
    return data


def one_image(folder: Path, image: Image.Image, size: tuple[int, int], **save: object) -> torch.Tensor:
    """What CocoDetection makes of ``image``, annotated as (width, height) ``size``."""
    suffix = save.pop("suffix", "png")
    (folder / "images").mkdir(exist_ok=True)
    image.save(folder / "images" / f"x.{suffix}", **save)
    data = {
        "images": [{"id": 1, "file_name": f"x.{suffix}", "width": size[0], "height": size[1]}],
        "annotations": [],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "a.json").write_text(json.dumps(data))
    return CocoDetection(folder / "images", folder / "a.json")[0][0]


def test_items(tmp_path):
    dataset = CocoDetection(*write(tmp_path))
    assert len(dataset) == 2
    assert dataset.class_names == ["bicycle", "toothbrush"] and dataset.category_ids == [2, 90]
    assert dataset.sizes == [(20, 20), (30, 40)]

    image, target = dataset[0]
    assert target["image_id"] == 3 and target["boxes"].shape == (0, 4) and target["labels"].dtype == torch.int64

    image, target = dataset[1]
    assert image.shape == (3, 30, 40) and image.dtype == torch.uint8 and image[:, 0, 0].tolist() == [1, 2, 3]
    assert target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [[30, 20, 40, 25], [1, 2, 4.5, 6]]
    assert target["labels"].tolist() == [2, 1]
    assert target["area"].tolist() == [70.5, 14]
    assert target["iscrowd"].tolist() == [0, 0]
    assert target["image_id"] == 7


def test_evaluation_keeps_crowds_and_numbers_annotations_from_one(tmp_path):
    coco = CocoDetection(*write(tmp_path)).coco
    assert sorted(coco.anns) == [1, 2, 3, 4, 5]
    assert [annotation["iscrowd"] for annotation in coco.imgToAnns[7]] == [0, 0, 1, 0, 0]


def test_transform_gets_image_and_target(tmp_path):
    dataset = CocoDetection(*write(tmp_path), transform=lambda image, target: (image.flip(-1), target["image_id"]))
    assert dataset[1][1] == 7


def test_quiet(tmp_path, capsys):
    CocoDetection(*write(tmp_path))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "path, value, key",
    [
        ("images", ..., r"images"),
        ("annotations", {}, r"annotations"),
        ("categories", [], r"categories"),
        ("images.1", 5, r"images\[1\]"),
        ("images.1.id", "3", r"images\[1\]\.id"),
        ("images.1.id", 7, r"images\[1\]\.id must be unique"),
        ("images.0.file_name", ..., r"images\[0\]\.file_name"),
        ("images.0.width", 0, r"images\[0\]\.width"),
        ("images.0.height", 30.5, r"images\[0\]\.height"),
        ("images.0.height", True, r"images\[0\]\.height"),
        ("categories.1.id", 90, r"categories\[1\]\.id must be unique"),
        ("categories.1.name", "toothbrush", r"categories\[1\]\.name must be unique"),
        ("categories.0.name", ..., r"categories\[0\]\.name"),
        ("categories.0.name", "caf\ud800", r"categories\[0\]\.name must be a string of whole characters"),
        ("categories.0.name", "a\0b", r"categories\[0\]\.name must be a string of whole characters without NUL"),
        ("images.0.id", 2**63, r"images\[0\]\.id must be an integer"),
        ("annotations.2.image_id", 8, r"annotations\[2\]\.image_id"),
        ("annotations.2.image_id", [7], r"annotations\[2\]\.image_id"),
        ("annotations.2.category_id", 1, r"annotations\[2\]\.category_id"),
        ("annotations.0.bbox", [1, 2, 3], r"annotations\[0\]\.bbox"),
        ("annotations.0.bbox", [1, 2, 3, float("nan")], r"annotations\[0\]\.bbox"),
        ("annotations.0.bbox", [1, 2, 3, "4"], r"annotations\[0\]\.bbox"),
        ("annotations.0.bbox", [1, 2, 3, 10**400], r"annotations\[0\]\.bbox"),
        ("annotations.0.area", None, r"annotations\[0\]\.area"),
        ("annotations.0.iscrowd", 2, r"annotations\[0\]\.iscrowd"),
    ],
)
def test_errors_name_file_and_key(tmp_path, path, value, key):
    with pytest.raises(ValueError, match=rf"a\.json: {key}"):
        CocoDetection(*write(tmp_path, changed(path, value)))


@pytest.mark.parametrize(
    "name",
    [
        "../b.png",
        "sub/../../b.png",
        "/etc/passwd",
        "C:\\b.png",
        "..\\b.png",
        "\\b.png",
        "",
        "a\0b",
        5,
        None,
        ".",
        "./.",
    ],
)
def test_paths_stay_in_the_image_folder(tmp_path, name):
    with pytest.raises(ValueError, match=r"images\[1\]\.file_name must be a path inside the image folder"):
        CocoDetection(*write(tmp_path, changed("images.1.file_name", name)))


@pytest.mark.parametrize("text", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"[" * 100_000, b'"text"', b"null"])
def test_files_that_are_no_annotations(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="broken.json"):
        check_annotations(read_json(path), str(path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "name", "bbox", "image_id", "width"]) | st.text(max_size=3), inner, max_size=3
        )
    ),
    max_leaves=8,
)
PLACES = [
    "images",
    "annotations",
    "categories",
    "images.0",
    "annotations.1",
    "categories.0",
    "images.0.id",
    "images.0.file_name",
    "images.0.width",
    "annotations.0.bbox",
    "annotations.0.bbox.2",
    "annotations.0.area",
    "annotations.0.iscrowd",
    "annotations.0.category_id",
    "categories.0.id",
    "categories.0.name",
]


@given(st.sampled_from(PLACES), JSON)
def test_any_value_is_read_or_refused_by_name(tmp_path, place, value):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(changed(place, value)))
    try:
        dataset = CocoDetection(tmp_path, path)
    except (ValueError, FileNotFoundError) as error:  # the images are not there
        assert "a.json" in str(error)
    else:
        assert len(dataset) == len(dataset.sizes)


def test_missing_files(tmp_path):
    images, annotations = write(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing.json"):
        CocoDetection(images, tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CocoDetection(tmp_path / "nowhere", annotations)
    (images / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images .*b\.png"):
        CocoDetection(images, annotations)


@pytest.mark.parametrize(
    "break_file",
    [
        lambda path: path.write_bytes(path.read_bytes()[:45]),
        lambda path: path.write_bytes(b"not an image"),
        lambda path: path.write_bytes(b""),
        lambda path: Image.new("RGB", (21, 20)).save(path),
    ],
)
def test_broken_images_are_named(tmp_path, break_file):
    images, annotations = write(tmp_path)
    break_file(images / "b.png")
    with pytest.raises(ValueError, match=r"b\.png"):
        CocoDetection(images, annotations)[0]


def test_grey_and_sixteen_bits(tmp_path):
    grey = one_image(tmp_path, Image.new("L", (4, 3), 77), (4, 3))
    assert grey.shape == (3, 3, 4) and grey.unique().tolist() == [77]
    sixteen = Image.fromarray(np.full((3, 4), 257 * 77 + 5, np.uint16))
    assert one_image(tmp_path, sixteen, (4, 3)).unique().tolist() == [77]
    wide = Image.fromarray(np.full((3, 4), 257 * 77, np.int32))
    assert one_image(tmp_path, wide, (4, 3), suffix="tiff").unique().tolist() == [77]
    with pytest.raises(ValueError, match="x.tiff.*floating-point"):
        one_image(tmp_path, Image.fromarray(np.ones((3, 4), np.float32)), (4, 3), suffix="tiff")
    assert one_image(tmp_path, Image.new("RGBA", (4, 3), (9, 8, 7, 0)), (4, 3))[:, 0, 0].tolist() == [9, 8, 7]
    assert one_image(tmp_path, Image.new("P", (4, 3)), (4, 3)).shape == (3, 3, 4)


@pytest.mark.parametrize(
    "orientation, annotated, corner",
    [
        (
            6,
            (3, 4),
            (0, -1),
        ),  # a quarter turn clockwise, annotated upright: the stored upper left goes to the upper right
        (6, (4, 3), (0, 0)),  # annotated on the stored pixels
        (3, (4, 3), (-1, -1)),  # half a turn
    ],
)
def test_exif_orientation(tmp_path, orientation, annotated, corner):
    array = np.zeros((3, 4, 3), np.uint8)
    array[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = one_image(tmp_path, Image.fromarray(array), annotated, exif=exif)
    assert tuple(image.shape[1:]) == annotated[::-1]
    assert image[0][corner] == 255 and image[0].count_nonzero() == 1


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"real data not found at {REAL_DATA}; set TARDKD_DATA")
@pytest.mark.parametrize(
    "name, split, images, boxes",
    [
        ("bccd", "train", 205, 2804),
        ("bccd", "test", 72, 945),
        ("cards", "test", 67, 143),
        ("deeppcb", "test", 500, 3140),
    ],
)
def test_real_data(name, split, images, boxes):
    folder = REAL_DATA / name
    dataset = CocoDetection(folder / "images", folder / "annotations" / f"{split}.json")
    assert len(dataset) == images
    targets = [dataset._target(i) for i in range(len(dataset))]
    assert abs(sum(len(target["boxes"]) for target in targets) - boxes) <= 2  # one or two without extent
    for i in (0, images - 1):
        image, target = dataset[i]
        assert tuple(image.shape[1:]) == dataset.sizes[i]
        assert target["labels"].min() >= 1 and target["labels"].max() <= len(dataset.class_names)
