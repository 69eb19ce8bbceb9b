"""Detection data sets in COCO format: validated annotations, images as tensors, targets as torchvision wants them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from tardkd.weights import is_text

# The kinds of images that Pillow decodes by itself. It knows others, some of which start programs: Ghostscript for EPS.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
MIN_SIDE = 0.1  # pixels; a thinner box carries no object and its log-width target would dominate the loss
STAND_IN = 64  # pixels, the side of what is shown for an image that cannot be read

Target = dict[str, Any]
Transform = Callable[[Tensor, Target], tuple[Tensor, Target]]
OnBadImage = Literal["error", "replace", "blank"]


class CocoDetection(Dataset):
    """Images of ``image_folder`` with the boxes of COCO ``annotations``, a file or what one holds.

    An item is ``(image, target)``: image a uint8 tensor (3, H, W); target a dict with ``boxes`` (G, 4) float32 xyxy
    pixels clipped to the image, ``labels`` (G,) int64 in 1..K, ``area`` (G,) float32, ``iscrowd`` (G,) int64 and the
    int ``image_id``. Crowd boxes and boxes without extent are left out of the targets; images without boxes stay.

    Args:
        on_bad_image: what to do about an image that is missing, cannot be decoded or has another size than annotated.
            ``error`` raises. The others warn once of each: ``replace`` gives the next image that can be read in its
            place, the same at every time; ``blank`` gives a black one, with ``unreadable: True`` in the target, which
            evaluation counts as an image without detections.

    Attributes:
        class_names: K names; label ``y`` is ``class_names[y - 1]``.
        category_ids: K COCO category ids in ascending order; label ``y`` is ``category_ids[y - 1]``.
        coco: the annotations as a :class:`pycocotools.coco.COCO`, crowds included, for evaluation.
        sizes: (height, width) of every image in pixels.

    Raises:
        FileNotFoundError: the annotation file, the image folder or an image is missing.
        ValueError: the annotations are malformed (names file and key), an image path leaves the folder, an image
            cannot be decoded or has another size than its annotation says (names the image's id and file).
    """

    on_bad_image: OnBadImage = "error"
    _longest_aspect = math.inf

    def __init__(
        self,
        image_folder: str | Path,
        annotations: str | Path | dict[str, Any],
        *,
        transform: Transform | None = None,
        on_bad_image: OnBadImage = "error",
    ) -> None:
        self.image_folder = Path(image_folder)
        self.transform = transform
        self.on_bad_image = on_bad_image
        source = f"annotations of {self.image_folder}" if isinstance(annotations, dict) else str(annotations)
        if not self.image_folder.is_dir():
            raise FileNotFoundError(f"image folder not found: {self.image_folder}")
        data = annotations if isinstance(annotations, dict) else read_json(Path(annotations))
        self._index(coco_index(check_annotations(data, source)))
        missing = missing_files(self.image_folder, self._file_names, source)
        if missing and (on_bad_image == "error" or len(missing) == len(self)):
            raise FileNotFoundError(
                f"{len(missing)} of {len(self)} images of {source} are "
                f"missing, the first: {self.image_folder / missing[0]}"
            )

    def _index(self, coco: COCO) -> None:
        self.coco = coco
        self.category_ids: list[int] = sorted(coco.cats)
        self.class_names: list[str] = [coco.cats[i]["name"] for i in self.category_ids]
        self._label_of = {category: label for label, category in enumerate(self.category_ids, start=1)}
        self._image_ids: list[int] = sorted(coco.imgs)
        images = [coco.imgs[i] for i in self._image_ids]
        self._file_names: list[str] = [image["file_name"] for image in images]
        self.sizes: list[tuple[int, int]] = [(image["height"], image["width"]) for image in images]
        self._bad = torch.zeros(max(1, len(images)), dtype=torch.bool).share_memory_()  # the loader's processes see it

    def __len__(self) -> int:
        return len(self._image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        index, image = self._readable(index)
        target = self._target(index)
        if image is None:
            return torch.zeros(3, STAND_IN, STAND_IN, dtype=torch.uint8), {**target, "unreadable": True}
        return self.transform(image, target) if self.transform else (image, target)

    def limit_aspect(self, longest: float) -> None:
        """From now on an image with a side more than `longest` times the other counts as one that cannot be read.

        Raises:
            ValueError: there is such an image, and ``on_bad_image`` is "error".
        """
        self._longest_aspect = longest
        for index, size in enumerate(self.sizes):
            if max(size) > longest * min(size) and self.on_bad_image == "error":
                self._image(index)

    def fingerprint(self) -> str:
        """A digest of all images' names and sizes, the classes and the objects, but not of any pixel.

        Two data sets with the same digest are trained and evaluated on alike, as long as the files hold the same.
        """
        digest = hashlib.blake2b(digest_size=16)
        for i in self.category_ids:
            digest.update(f"{i} {self.coco.cats[i]['name']}\n".encode())
        for i, name, size in zip(self._image_ids, self._file_names, self.sizes):
            digest.update(f"{i} {name} {size}\n".encode(errors="surrogateescape"))
            for a in self.coco.imgToAnns[i]:
                box = [float(number) for number in a["bbox"]]
                digest.update(f"{a['category_id']} {box} {float(a['area'])} {a['iscrowd']}\n".encode())
        return digest.hexdigest()

    @property
    def bad_images(self) -> list[int]:
        """The ids of the images found bad so far, by this process and the loader's."""
        return [image_id for image_id, bad in zip(self._image_ids, self._bad.tolist()) if bad]

    def _readable(self, index: int) -> tuple[int, Tensor | None]:
        """The image at ``index``; where it is bad, the first good one after it and its index, or None."""
        for step in range(len(self)):
            candidate = (index + step) % len(self) if step else index
            try:
                return candidate, self._image(candidate)
            except (FileNotFoundError, ValueError) as error:
                if self.on_bad_image == "error":
                    raise
                self._warn(candidate, error)
                if self.on_bad_image == "blank":
                    return candidate, None
        raise ValueError(f"none of the {len(self)} images can be read; the first was {self._file_names[0]}")

    def _warn(self, index: int, error: Exception) -> None:
        if not self._bad[index]:
            self._bad[index] = True
            instead = (
                "the next good one takes its place"
                if self.on_bad_image == "replace"
                else "it counts as an image without detections"
            )
            warnings.warn(f"{error}; {instead}", stacklevel=2)

    def _image(self, index: int) -> Tensor:
        path, (height, width) = self.image_folder / self._file_names[index], self.sizes[index]
        try:
            if max(height, width) > self._longest_aspect * min(height, width):
                raise ValueError(f"image {path} is {width}x{height}, too thin: resized for the model nothing is left")
            return read_image(path, (height, width))
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"image id {self._image_ids[index]}: {error}") from error

    def _target(self, index: int) -> Target:
        height, width = self.sizes[index]
        annotations = [a for a in self.coco.imgToAnns[self._image_ids[index]] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
        boxes = boxes.float()
        keep = has_extent(boxes)
        return {
            "boxes": boxes[keep],
            "labels": torch.tensor([self._label_of[a["category_id"]] for a in annotations], dtype=torch.int64)[keep],
            "area": torch.tensor([a["area"] for a in annotations], dtype=torch.float32)[keep],
            "iscrowd": torch.zeros(int(keep.sum()), dtype=torch.int64),
            "image_id": self._image_ids[index],
        }


def has_extent(boxes: Tensor) -> Tensor:
    """(G,) bool: boxes (G, 4) xyxy in pixels at least ``MIN_SIDE`` wide and high."""
    return ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(dim=1)


def missing_files(folder: Path, names: list[str], source: str) -> list[str]:
    """Those of ``names`` that are no files in ``folder``; ValueError for one that a link leads out of it."""
    root = folder.resolve()
    resolved = cache(Path.resolve)
    missing = []
    for name in names:
        path = root / name
        try:
            real = path.resolve() if path.is_symlink() else resolved(path.parent)
            found = path.is_file()
        except (OSError, ValueError, RuntimeError):  # a name that no file can have, no right to look, a circle of links
            missing.append(name)
            continue
        if not real.is_relative_to(root):
            raise ValueError(
                f"{source}: images.file_name {name!r} is a link that leads out of the image folder, to {real}"
            )
        if not found:
            missing.append(name)
    return missing


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """The image at ``path`` as uint8 RGB (3, H, W); 16-bit grey is scaled to 8 bits, transparency is left out.

    Nothing is decoded of an image whose header has another size than the annotation: it may be huge.

    The annotated ``size`` = (height, width) tells whether the boxes were drawn on the stored pixels or on the image as
    EXIF turns it. Where both have that size (half turns, square images), EXIF is followed, as Detectron2, MMDetection
    and annotation tools do.
    """
    try:
        with Image.open(path, formats=_formats()) as image:
            _compare(path, (image.height, image.width), size, (size, size[::-1]))
            upright = ImageOps.exif_transpose(image)
            if (upright.height, upright.width) == size:
                image = upright
            _compare(path, (image.height, image.width), size, (size,))
            array = np.array(_eight_bit(image).convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"image not found: {path}") from None
    except _OtherSize as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... on broken files
        raise ValueError(f"cannot read image {path}: {error}") from error
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


class _OtherSize(Exception):
    pass


def _compare(
    path: Path, found: tuple[int, int], annotated: tuple[int, int], allowed: tuple[tuple[int, int], ...]
) -> None:
    if found not in allowed:
        raise _OtherSize(f"image {path} is {found[1]}x{found[0]}, its annotation says {annotated[1]}x{annotated[0]}")


@cache
def _formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this Pillow was built with."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey images of 16 bits scaled to 8 (Pillow's own conversion would clip them to white)."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; convert the image to 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    array = np.asarray(image)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        raise ValueError(f"pixel values {low}..{high} do not fit 16 bits")
    if image.mode == "I" and high <= 255:
        return Image.fromarray(array.astype(np.uint8))
    return Image.fromarray((array.astype(np.uint32) // 257).astype(np.uint8))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"annotation file not found: {path}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def check_annotations(data: Any, source: str) -> dict[str, Any]:
    """COCO annotations, checked; ``area`` and ``iscrowd`` filled in where absent.

    Raises ValueError naming `source` and the key that is wrong.
    """
    try:
        return _check(data)
    except _Malformed as error:
        raise ValueError(f"{source}: {error}") from None


class _Malformed(Exception):
    pass


def _check(data: Any) -> dict[str, Any]:
    _expect(isinstance(data, dict), "top level", "an object with images, annotations and categories", data)
    for key in ("images", "annotations", "categories"):
        _expect(isinstance(data.get(key), list), key, "a list of objects", data.get(key))
        for i, entry in enumerate(data[key]):
            _expect(isinstance(entry, dict), f"{key}[{i}]", "an object", entry)

    for i, category in enumerate(data["categories"]):
        _expect(_is_int(category.get("id")), f"categories[{i}].id", "an integer", category.get("id"))
        name = category.get("name")
        _expect(is_text(name), f"categories[{i}].name", "a string of whole characters without NUL", name)
    for i, image in enumerate(data["images"]):
        _expect(_is_int(image.get("id")), f"images[{i}].id", "an integer", image.get("id"))
        _expect(
            _inside(image.get("file_name")),
            f"images[{i}].file_name",
            "a path inside the image folder",
            image.get("file_name"),
        )
        for side in ("width", "height"):
            value = image.get(side)
            _expect(_is_int(value) and 0 < value < 2**31, f"images[{i}].{side}", "a positive integer", value)
    categories = _unique(data["categories"], "categories", "id")
    _unique(data["categories"], "categories", "name")
    images = _unique(data["images"], "images", "id")
    _expect(len(categories) > 0, "categories", "at least one category", [])

    annotations = [
        _check_annotation(f"annotations[{i}]", annotation, images, categories)
        for i, annotation in enumerate(data["annotations"])
    ]
    return {"images": data["images"], "annotations": annotations, "categories": data["categories"]}


def _check_annotation(where: str, annotation: dict[str, Any], images: set[int], categories: set[int]) -> dict[str, Any]:
    image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
    box: Any = annotation.get("bbox")
    _expect(_is_int(image_id) and image_id in images, f"{where}.image_id", "the id of one of images", image_id)
    _expect(
        _is_int(category_id) and category_id in categories,
        f"{where}.category_id",
        "the id of one of categories",
        category_id,
    )
    _expect(
        isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)),
        f"{where}.bbox",
        "4 finite numbers [x, y, width, height]",
        box,
    )
    area, crowd = annotation.get("area", box[2] * box[3]), annotation.get("iscrowd", 0)
    _expect(_is_number(area), f"{where}.area", "a finite number", area)
    _expect(crowd in (0, 1), f"{where}.iscrowd", "0 or 1", crowd)
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "area": area, "iscrowd": int(crowd)}


def _expect(good: bool, where: str, expected: str, found: Any) -> None:
    if not good:
        raise _Malformed(f"{where} must be {expected}, found {repr(found)[:80]}")


def _unique(entries: list[dict[str, Any]], where: str, key: str) -> set[Any]:
    seen: set[Any] = set()
    for i, entry in enumerate(entries):
        _expect(entry[key] not in seen, f"{where}[{i}].{key}", "unique", entry[key])
        seen.add(entry[key])
    return seen


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e12


def _inside(name: Any) -> bool:
    """True for a relative path without steps upwards, read as POSIX and as Windows would."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    paths = PurePosixPath(name), PureWindowsPath(name)
    return all(path.name and not path.anchor and ".." not in path.parts for path in paths)


def coco_index(data: dict[str, Any]) -> COCO:
    """The quiet :class:`COCO` of ``data``; annotations are numbered from 1 (COCOeval takes id 0 for "no match")."""
    coco = COCO()
    coco.dataset = {**data, "annotations": [{**a, "id": i} for i, a in enumerate(data["annotations"], start=1)]}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
