"""Readers of annotations and recipes: whatever a file holds, the error is one that names it."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tardkd.data import CocoDetection
from tardkd.data.coco import check_annotations, read_json
from tardkd.data.scenes import write_scenes
from tardkd.data.voc import read_voc, read_xml
from tardkd.train.config import Config, ConfigError, load_config, parse_config

FAST = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SCALARS = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
DATA = {
    "images": [{"id": 3, "file_name": "a.png", "width": 8, "height": 6}],
    "categories": [{"id": 7, "name": "thing"}],
    "annotations": [{"id": 1, "image_id": 3, "category_id": 7, "bbox": [1, 1, 3, 3], "area": 9, "iscrowd": 0}],
}
RECIPE = {
    "data": {
        "kind": "coco",
        "root": "r",
        "train": {"images": "i", "annotations": "a"},
        "val": {"images": "i", "annotations": "a"},
    },
    "student": {"name": "resnet_fpn"},
    "teacher": {"weights": "w"},
    "train": {"epochs": 2},
    "output": "o",
}


def places(tree, path=()):
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(tree, path, value):
    if not path:
        return value
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


@FAST
@given(place=st.sampled_from(list(places(DATA))), value=VALUES)
def test_annotations_with_one_value_changed(place, value):
    try:
        check_annotations(changed(DATA, place, value), "the file")
    except ValueError as error:
        assert "the file" in str(error)


@FAST
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_as_annotations(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    for reader in (lambda: check_annotations(read_json(path), str(path)), lambda: read_xml(path)):
        try:
            reader()
        except ValueError as error:
            assert "a.json" in str(error)


XML = (
    "<annotation><filename>a.jpg</filename><size><width>8</width><height>6</height></size><object><name>thing</name>"
    "<difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></object>"
    "</annotation>"
)


@FAST
@given(start=st.integers(0, len(XML)), length=st.integers(0, 30), piece=st.text(max_size=8))
def test_voc_annotations_with_a_piece_changed(tmp_path, start, length, piece):
    for name in ("Annotations", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    (tmp_path / "Annotations/a.xml").write_text(XML[:start] + piece + XML[start + length :], encoding="utf-8")
    try:
        check_annotations(read_voc(tmp_path, "train"), "the folder")
    except ValueError as error:
        assert "a.xml" in str(error) or "the folder" in str(error)


@pytest.mark.parametrize(
    "prolog",
    [
        '<!DOCTYPE a [<!ENTITY x "aaaaaaaaaa"><!ENTITY y "&x;&x;&x;&x;&x;&x;&x;&x;">]>',
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
    ],
)
def test_entities_are_refused(tmp_path, prolog):
    path = tmp_path / "a.xml"
    path.write_text(prolog + XML.replace("thing", "&x;"))
    with pytest.raises(ValueError, match="a.xml"):
        read_xml(path)


@FAST
@given(place=st.sampled_from(list(places(RECIPE))), value=VALUES)
def test_recipes_with_one_value_changed(place, value):
    try:
        assert isinstance(parse_config(changed(RECIPE, place, value), source="recipe"), Config)
    except ConfigError as error:
        assert "recipe" in str(error)


KEYS = [".".join(map(str, place)) for place in places(RECIPE)]


@FAST
@given(content=st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_any_bytes_as_a_recipe(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load_config(path)


@FAST
@given(override=st.text(max_size=30) | st.tuples(st.sampled_from(KEYS), st.text(max_size=12)).map("=".join))
def test_any_override(override):
    with contextlib.suppress(ConfigError):
        parse_config(copy.deepcopy(RECIPE), [override], source="recipe")


def test_an_override_of_one_of_two_sections_that_yaml_shares():
    tree = yaml.safe_load(yaml.safe_dump(RECIPE) + "\n")
    tree["teacher"]["model"] = tree["student"]
    config = parse_config(tree, ["teacher.model.width=2.0"], source="recipe")
    assert (config.teacher.model.width, config.student.width) == (2.0, 1.0)


def test_paths_of_images(tmp_path):
    write_scenes(tmp_path, splits={"train": 1}, image_size=64, seed=0)
    annotations = json.loads((tmp_path / "annotations/train.json").read_text())
    for name in ("../x.png", "/etc/passwd", "a/../../x.png", "", "..", "C:\\x.png", "a\\..\\..\\x.png"):
        annotations["images"][0]["file_name"] = name
        with pytest.raises(ValueError, match="file_name"):
            CocoDetection(tmp_path / "images", annotations)
