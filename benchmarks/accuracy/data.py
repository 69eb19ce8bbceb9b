"""The data sets, made small once so that runs on a CPU need not decode and resize large images again and again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tardkd.data import CocoDetection
from tardkd.data.transforms import build_transform
from tardkd.files import replacing

from .models import Geometry


@dataclass(frozen=True)
class DataSet:
    """A folder in COCO format, with ``images`` and ``annotations``, and how detectors are to see it."""

    folder: str
    geometry: Geometry
    augment: dict[str, Any]  # of build_transform
    val: str | None  # a split; None: every fifth training image becomes one
    epochs: int  # of a pair's student, unless the pair says otherwise
    batch: int = 2  # images of a step


def prepare(data: DataSet, root: Path, cache: Path) -> Path:
    """A folder with the data set's three splits as ``annotations/*.json`` and its images, resized to the geometry.

    Average precision does not change with the scale, so that all is measured in the resized pixels.
    """
    short, source = data.geometry.short, root / data.folder
    target = cache / f"{data.folder}-{short}"
    if (target / "complete").exists():
        return target
    (target / "annotations").mkdir(parents=True, exist_ok=True)
    (target / "images").mkdir(exist_ok=True)
    for split, content in _read_splits(data, source).items():
        small = {**content, "images": [], "annotations": []}
        factors = {}
        for image in content["images"]:
            factor = short / min(image["width"], image["height"])
            size = round(image["width"] * factor), round(image["height"] * factor)
            name = f"{image['id']}-{split}.png"
            with Image.open(source / "images" / image["file_name"]) as picture:
                picture.convert("RGB").resize(size, Image.Resampling.BILINEAR).save(target / "images" / name)
            small["images"].append({**image, "file_name": name, "width": size[0], "height": size[1]})
            factors[image["id"]] = size[0] / image["width"], size[1] / image["height"]
        for annotation in content["annotations"]:
            x, y = factors[annotation["image_id"]]
            left, top, width, height = annotation["bbox"]
            box = [left * x, top * y, width * x, height * y]
            small["annotations"].append({**annotation, "bbox": box, "area": box[2] * box[3]})
        _write(target / "annotations" / f"{split}.json", small)
    (target / "complete").touch()
    return target


def open_split(data: DataSet, folder: Path, split: str, *, augment: bool = False) -> CocoDetection:
    """One of the splits that :func:`prepare` has left in ``folder``."""
    transform = build_transform(**data.augment) if augment else None
    return CocoDetection(folder / "images", folder / "annotations" / f"{split}.json", transform=transform)


def _read_splits(data: DataSet, source: Path) -> dict[str, dict[str, Any]]:
    def read(split: str) -> dict[str, Any]:
        return json.loads((source / "annotations" / f"{split}.json").read_text(encoding="utf-8"))

    splits = {"train": read("train"), "test": read("test")}
    if data.val:
        return {**splits, "val": read(data.val)}
    ordered = sorted(splits["train"]["images"], key=lambda image: image["file_name"])
    held_out = {image["id"] for image in ordered[::5]}
    train, everything = splits["train"], {image["id"] for image in ordered}
    return {**splits, "train": _only(train, everything - held_out), "val": _only(train, held_out)}


def _only(content: dict[str, Any], image_ids: Iterable[int]) -> dict[str, Any]:
    wanted = set(image_ids)
    return {
        **content,
        "images": [image for image in content["images"] if image["id"] in wanted],
        "annotations": [box for box in content["annotations"] if box["image_id"] in wanted],
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
