from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from tardkd.data import VocDetection, build_loader
from tardkd.data.coco import CocoDetection
from tardkd.data.voc import read_voc
from tardkd.train.evaluate import evaluate
from tardkd.train.logs import describe

OBJECT = "<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>"
SIDES = ("xmin", "ymin", "xmax", "ymax")


def thing(name: str, *box: float, difficult: int = 0) -> str:
    box = "".join(f"<{side}>{value}</{side}>" for side, value in zip(SIDES, box))
    return OBJECT.format(name=name, difficult=difficult, box=box)


def write(root: Path, name: str, *objects: str, size: tuple[int, int] = (20, 10)) -> Path:
    """An image and its annotation; returns the latter's path."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(root / "JPEGImages" / f"{name}.jpg")
    width, height = size
    path = root / "Annotations" / f"{name}.xml"
    path.write_text(
        f"<annotation><filename>{name}.jpg</filename><size><width>{width}</width><height>{height}</height>"
        f"</size>{''.join(objects)}</annotation>"
    )
    return path


def split(root: Path, name: str, *lines: str) -> None:
    (root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "a", thing("dog", 1, 1, 20, 10), thing("cat", 3, 2, 7.5, 6, difficult=1))
    write(tmp_path, "b", thing("ant", 5, 5, 6, 8))
    write(tmp_path, "c")
    split(tmp_path, "train", "a", "c")
    split(tmp_path, "val", "b  1", "")
    return tmp_path


def test_read_as_coco(folder):
    data = read_voc(folder, "train")
    assert [category["name"] for category in data["categories"]] == ["ant", "cat", "dog"]  # of the folder, by alphabet
    assert [image["file_name"] for image in data["images"]] == ["a.jpg", "c.jpg"]
    dog, cat = data["annotations"]
    assert dog == {"image_id": 1, "category_id": 3, "bbox": [0, 0, 20, 10], "iscrowd": 0}  # the whole image
    assert cat == {"image_id": 1, "category_id": 2, "bbox": [2, 1, 5.5, 5], "iscrowd": 1}


def test_as_a_data_set(folder):
    dataset = CocoDetection(folder / "JPEGImages", read_voc(folder, "train"))
    assert (len(dataset), dataset.class_names, dataset.sizes) == (2, ["ant", "cat", "dog"], [(10, 20)] * 2)
    image, target = dataset[0]
    assert image.shape == (3, 10, 20)
    assert torch.equal(target["boxes"], torch.tensor([[0.0, 0.0, 20.0, 10.0]]))  # the difficult one is not learned
    assert target["labels"].tolist() == [3]
    assert len(dataset[1][1]["boxes"]) == 0
    assert [a["iscrowd"] for a in dataset.coco.dataset["annotations"]] == [0, 1]  # but known to the evaluation


def test_classes_can_be_given(folder):
    data = read_voc(folder, "val", ["dog", "ant"])
    assert [category["name"] for category in data["categories"]] == ["dog", "ant"]
    assert data["annotations"][0]["category_id"] == 2
    with pytest.raises(ValueError, match=r"a.xml: object/name is 'cat', which is none of the classes dog, ant"):
        read_voc(folder, "train", ["dog", "ant"])


@pytest.mark.parametrize(
    "content, message",
    [
        ("<annotation><filename>a.jpg</filename></annotation>", "annotation/size/width is missing or empty"),
        ("<annotation>", "is not XML"),
        ("<annotation>\0</annotation>", "is not XML in UTF-8"),
        ("<annotation><filename>b.jpg</filename></annotation>", "filename is 'b.jpg', which is not the image"),
        ("<?xml version='1.0' encoding='none-such'?><annotation/>", "is not XML"),
        ("<!DOCTYPE a [<!ENTITY x 'y'>]><annotation>&x;</annotation>", "declares a document type or entities"),
        (
            "<annotation><filename>a.jpg</filename><size><width>wide</width><height>1</height></size></annotation>",
            "annotation/size/width must be a number, found 'wide'",
        ),
        (
            (
                "<annotation><filename>a.jpg</filename><size><width>20</width><height>10</height></size><object><name>dog</name>"
                "<bndbox><xmin>nan</xmin></bndbox></object></annotation>"
            ),
            "object/bndbox/xmin must be a number, found 'nan'",
        ),
    ],
)
def test_what_is_wrong_is_named(folder, content, message):
    (folder / "Annotations" / "a.xml").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.xml:? {message}"):
        read_voc(folder, "train", ["dog"])


def test_what_is_missing_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"list of the split not found: .*test\.txt"):
        read_voc(folder, "test")
    (folder / "Annotations" / "c.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"annotation file not found: .*c\.xml"):
        read_voc(folder, "train")
    split(folder, "train")
    with pytest.raises(ValueError, match="train.txt names no image"):
        read_voc(folder, "train")


@pytest.mark.parametrize("name", ["../a", "x/../../a", "..", "\\\\host\\a"])
def test_names_cannot_leave_the_folder(folder, name):
    split(folder, "train", name)
    with pytest.raises(ValueError, match="is no plain name"):
        read_voc(folder, "train")


def test_file_names_cannot_leave_the_folder(folder):
    path = folder / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("a.jpg", "../../a.jpg"))
    with pytest.raises(ValueError, match=r"a\.xml: filename is .*, which is no plain name"):
        CocoDetection(folder / "JPEGImages", read_voc(folder, "train"))


class FindsTheDog(torch.nn.Module):
    """And, less surely, the difficult cat, which counts neither way."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images):
        boxes = torch.tensor([[0.0, 0, 20, 10], [2, 1, 7.5, 6]])
        found = {"boxes": boxes, "labels": torch.tensor([3, 2]), "scores": torch.tensor([0.9, 0.8])}
        return [found, *({key: value[:0] for key, value in found.items()} for _ in images[1:])]


def test_vocs_own_precision_is_reported_too(folder):
    dataset = VocDetection(folder, "train")
    loader = build_loader(dataset, batch_size=2, shuffle=False, seed=0, epoch=0)
    metrics = evaluate(FindsTheDog(), loader, dataset)
    assert metrics["VOC_AP50"] == 100 and metrics["AP50"] == pytest.approx(100)
    assert "VOC_AP50 100.0" in describe(metrics)
    nothing = evaluate(
        FindsTheDog(),
        build_loader(VocDetection(folder, "val"), batch_size=2, shuffle=False, seed=0, epoch=0),
        VocDetection(folder, "val"),
    )
    assert nothing["VOC_AP50"] == 0
