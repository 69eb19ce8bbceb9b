"""Pascal VOC folders, read as COCO annotations in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

from .coco import CocoDetection

IMAGES, ANNOTATIONS, SPLITS = "JPEGImages", "Annotations", PurePosixPath("ImageSets/Main")


class VocDetection(CocoDetection):
    """One split of the Pascal VOC folder ``root``, as :func:`read_voc` reads it; ``settings`` as for CocoDetection."""

    def __init__(self, root: str | Path, split: str, classes: Sequence[str] | None = None, **settings: Any) -> None:
        super().__init__(Path(root) / IMAGES, read_voc(root, split, classes), **settings)


def read_voc(root: str | Path, split: str, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """The images that ``ImageSets/Main/<split>.txt`` names, as a COCO data set; paths are relative to ``JPEGImages``.

    VOC counts pixels from 1 and includes the last one, so that its box (x1, y1, x2, y2) is COCO's
    (x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1). Objects marked difficult become crowds: neither learned nor counted
    against a detector.

    Args:
        root: holds ``JPEGImages``, ``Annotations`` and ``ImageSets``.
        classes: names in the order of the labels; None: those of all annotations of the folder, by alphabet.

    Raises:
        FileNotFoundError: the list of the split or an annotation file is missing.
        ValueError: an annotation is malformed, or names another class; says which file and element.
    """
    root = Path(root)
    names = read_split(root / SPLITS / f"{split}.txt")
    if classes is None:
        classes = class_names(root)
    ids = {name: index for index, name in enumerate(classes, start=1)}
    images, annotations = [], []
    for image_id, name in enumerate(names, start=1):
        path = root / ANNOTATIONS / f"{name}.xml"
        tree = read_xml(path)
        file_name = _text(tree, "filename", path)
        if file_name != PurePosixPath(file_name).name or "\\" in file_name:
            raise ValueError(f"{path}: filename is {file_name!r}, which is no plain name")
        if PurePosixPath(file_name).stem != name:
            raise ValueError(f"{path}: filename is {file_name!r}, which is not the image of that annotation's name")
        width, height = (int(_number(tree, f"size/{side}", path)) for side in ("width", "height"))
        if min(width, height) < 1:
            raise ValueError(f"{path}: annotation/size must be that of the image, found {width}x{height}")
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for item in tree.iter("object"):
            label = _text(item, "name", path)
            if label not in ids:
                raise ValueError(f"{path}: object/name is {label!r}, which is none of the classes {', '.join(classes)}")
            x1, y1, x2, y2 = (_number(item, f"bndbox/{side}", path) for side in ("xmin", "ymin", "xmax", "ymax"))
            annotations.append(
                {
                    "image_id": image_id,
                    "category_id": ids[label],
                    "bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1],
                    "iscrowd": int(item.findtext("difficult", "0").strip() == "1"),
                }
            )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": index, "name": name} for name, index in ids.items()],
    }


def read_split(path: Path) -> list[str]:
    """The image names of a split; a second column, as the lists of one class have it, is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"list of the split not found: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a list of names: {error}") from None
    names = [line.split()[0] for line in lines if line.strip()]
    for name in names:
        if "/" in name or "\\" in name or name in (".", ".."):
            raise ValueError(f"{path}: {name!r} is no plain name")
    if not names:
        raise ValueError(f"{path} names no image")
    return names


def class_names(root: Path) -> list[str]:
    """The names of all objects in the folder's annotations, by alphabet."""
    paths = sorted((root / ANNOTATIONS).glob("*.xml"))
    if not paths:
        raise FileNotFoundError(f"no annotations in {root / ANNOTATIONS}")
    return sorted({_text(item, "name", path) for path in paths for item in read_xml(path).iter("object")})


def read_xml(path: Path) -> ElementTree.Element:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"annotation file not found: {path}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ValueError(f"cannot read {path}: {error}") from None
    if b"\0" in data:
        raise ValueError(f"{path} is not XML in UTF-8 or another encoding that extends ASCII")
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise ValueError(f"{path} declares a document type or entities, which an annotation has no use for")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        raise ValueError(f"{path} is not XML: {error}") from None


def _text(element: ElementTree.Element, key: str, path: Path) -> str:
    text = (element.findtext(key) or "").strip()
    if not text:
        raise ValueError(f"{path}: {element.tag}/{key} is missing or empty")
    return text


def _number(element: ElementTree.Element, key: str, path: Path) -> float:
    text = _text(element, key, path)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) < 2**31:  # nor NaN
        raise ValueError(f"{path}: {element.tag}/{key} must be a number, found {text[:80]!r}")
    return number
