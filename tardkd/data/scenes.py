"""Built-in scenes: small synthetic photographs with COCO annotations, the same on every machine.

Each image shows textured objects on a textured, cluttered ground, partly hidden by each other, under uneven light
and sensor noise. A class is an outline together with a pattern. Outlines are shared between classes, colours are
drawn afresh for every object, and distractors have a class's outline with a plain surface or a class's pattern in
another outline, so neither alone tells what an object is.

An image is a pure function of (seed, split, index): integer arithmetic on PCG64's integers, a table of sines, and
Pillow's drawing and resizing of 8-bit pictures, none of which hang on a machine's floating point.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from .coco import CocoDetection, Transform, coco_index

UNIT = 256  # an object's half side in its own coordinates
SMALLEST = 12  # pixels; the largest things fill the image
MIN_VISIBLE = 3, 5  # the share of an object that others and the image border must leave
TILT = 20  # 256ths of a turn to either side
SAMPLES = 4  # per pixel and axis, for smooth outlines

SINE = [round(4096 * math.sin(2 * math.pi * k / 256)) for k in range(256 + 64)]  # in 1/4096, over 1 1/4 turns

# ---- outlines: polygons in object coordinates ---------------------------------------------------------------------


def _polar(corners: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(angle in 256ths of a turn, radius) to (x, y)."""
    return [(radius * SINE[angle + 64] // 4096, radius * SINE[angle] // 4096) for angle, radius in corners]


OUTLINES = {
    "disc": _polar([(4 * k, 250) for k in range(64)]),
    "square": [(-180, -180), (180, -180), (180, 180), (-180, 180)],
    "triangle": _polar([(192, 256), (21, 256), (107, 256)]),
    "star": _polar([((192 + k * 256 // 10) % 256, 112 if k % 2 else 256) for k in range(10)]),
    "cross": [
        (x * 80, y * 80)
        for x, y in (
            (-1, -3),
            (1, -3),
            (1, -1),
            (3, -1),
            (3, 1),
            (1, 1),
            (1, 3),
            (-1, 3),
            (-1, 1),
            (-3, 1),
            (-3, -1),
            (-1, -1),
        )
    ],
    "hexagon": _polar([(k * 256 // 6, 250) for k in range(6)]),
}

# ---- patterns: True where an object at (u, v) has its second colour -----------------------------------------------

Pattern = Callable[[np.ndarray, np.ndarray], np.ndarray]
PATTERNS: dict[str, Pattern] = {
    "plain": lambda u, v: np.zeros(u.shape, bool),
    "rings": lambda u, v: (u * u + v * v > 90 * 90) & (u * u + v * v < 175 * 175),
    "band": lambda u, v: abs(v) < 85,
    "checker": lambda u, v: ((u // 110 + v // 110) & 1).astype(bool),
    "ribbon": lambda u, v: (abs(u) < 45) | (abs(v) < 45),
    "core": lambda u, v: u * u + v * v < 90 * 90,
    "rim": lambda u, v: np.maximum(v, abs(u) * 222 // 256 - v // 2) > 75,
}

CLASSES = {  # name: (outline, pattern)
    "target": ("disc", "rings"),
    "ball": ("disc", "band"),
    "board": ("square", "checker"),
    "parcel": ("square", "ribbon"),
    "sign": ("triangle", "rim"),
    "star": ("star", "core"),
}
DISTRACTORS = [
    ("disc", "plain"),
    ("square", "plain"),
    ("triangle", "plain"),
    ("cross", "plain"),
    ("cross", "core"),
    ("hexagon", "checker"),
    ("hexagon", "band"),
    ("hexagon", "plain"),
]


@dataclass
class Scene:
    """One image, uint8 (H, W, 3), with its objects.

    Of every object: the visible box [x, y, w, h] in whole pixels, the label counted from 1, the visible area in pixels.
    """

    image: np.ndarray
    boxes: list[list[int]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    areas: list[int] = field(default_factory=list)


def draw_scene(seed: int, split: str, index: int, image_size: int) -> Scene:
    """The scene ``index`` of ``split``; ``image_size`` is its side in pixels."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    stage = _Stage(_background(rng, image_size))
    names = list(CLASSES)
    objects = rng.integers(1, len(names) + 1, rng.integers(3, 8)).tolist()
    distractors = [0] * int(rng.integers(0, 3))
    things = [(_log_uniform(rng, SMALLEST, image_size), label) for label in objects + distractors]
    for side, label in sorted(things, reverse=True):  # the large ones first, as they would hide the small
        outline, pattern = CLASSES[names[label - 1]] if label else DISTRACTORS[rng.integers(len(DISTRACTORS))]
        # A crowded scene may have no room for another thing.
        any(stage.place(rng, label, side, outline, pattern) for _attempt in range(4))
    return stage.photograph(rng)


class _Stage:
    """A ground with things laid on it one over another, and the record of what still shows of each."""

    def __init__(self, ground: np.ndarray) -> None:
        self.pixels = ground  # (H, W, 3) int32
        self.owner = np.full(ground.shape[:2], -1, np.int16)  # the number of the thing that shows at a pixel
        self.labels: list[int] = []  # of the things by number; 0 for distractors
        self.areas: list[int] = []  # pixels of the whole thing
        self.visible: list[int] = []  # pixels that show

    def place(self, rng: Generator, label: int, side: int, outline: str, pattern: str) -> bool:
        """Draws one thing somewhere; False where that would hide too much of it or of another object."""
        size = len(self.pixels)
        left, top = rng.integers(-side // 3, size - side * 2 // 3, 2).tolist()
        angle, stretch = int(rng.integers(-TILT, TILT + 1)) % 256, int(rng.integers(192, 257))
        cover = _cover(outline, side, angle, stretch)
        inside, part = _overlap(left, top, side, size)
        shown = cover[part] >= 128
        area, visible = int((cover >= 128).sum()), int(shown.sum())
        hidden = np.bincount(self.owner[inside][shown] + 1, minlength=len(self.labels) + 1)[1:].tolist()
        left_over = [before - lost for before, lost in zip(self.visible, hidden, strict=True)]
        if not _enough(visible, area) or any(
            label and not _enough(rest, whole)
            for label, rest, whole in zip(self.labels, left_over, self.areas, strict=True)
        ):
            return False
        self._shade(rng, cover, left, top)
        u, v = _object_coordinates(side, angle, stretch)
        colour = _surface(rng, PATTERNS[pattern](u, v), u, v)[part]
        self.pixels[inside] += (colour - self.pixels[inside]) * cover[part].astype(np.int32)[..., None] // 255
        self.owner[inside][shown] = len(self.labels)
        self.labels.append(label)
        self.areas.append(area)
        self.visible = [*left_over, visible]
        return True

    def _shade(self, rng: Generator, cover: np.ndarray, left: int, top: int) -> None:
        """Darkens the ground beside a thing."""
        reach = max(1, len(cover) // 10)
        left, top = left + int(rng.integers(-reach, reach + 1)), top + int(rng.integers(0, reach + 1))
        inside, part = _overlap(left, top, len(cover), len(self.pixels))
        self.pixels[inside] -= self.pixels[inside] * cover[part].astype(np.int32)[..., None] // 640

    def photograph(self, rng: Generator) -> Scene:
        scene = Scene(_photograph(rng, self.pixels))
        for number, label in enumerate(self.labels):
            if label:
                rows, columns = np.nonzero(self.owner == number)
                x, y = int(columns.min()), int(rows.min())
                scene.boxes.append([x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y])
                scene.labels.append(label)
                scene.areas.append(self.visible[number])
        return scene


def _enough(visible: int, area: int) -> bool:
    return visible > 0 and visible * MIN_VISIBLE[1] >= area * MIN_VISIBLE[0]


def _overlap(left: int, top: int, side: int, size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a square at (left, top) meets the image, as slices of the image and of the square."""
    x1, y1, x2, y2 = max(left, 0), max(top, 0), max(min(left + side, size), 0), max(min(top + side, size), 0)
    return np.s_[y1:y2, x1:x2], np.s_[y1 - top : y2 - top, x1 - left : x2 - left]


# ---- objects -------------------------------------------------------------------------------------------------------


def _cover(outline: str, side: int, angle: int, stretch: int) -> np.ndarray:
    """(side, side) uint8: how much of each pixel the turned outline covers."""
    sine, cosine, half = SINE[angle], SINE[angle + 64], side * SAMPLES // 2
    corners = [
        (
            (x * cosine - y * sine * stretch // 256) * half // (4096 * UNIT) + half,
            (x * sine + y * cosine * stretch // 256) * half // (4096 * UNIT) + half,
        )
        for x, y in OUTLINES[outline]
    ]
    mask = Image.new("L", (side * SAMPLES, side * SAMPLES))
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    return np.asarray(mask.reduce(SAMPLES))


def _object_coordinates(side: int, angle: int, stretch: int) -> tuple[np.ndarray, np.ndarray]:
    """(side, side) int32 coordinates of the pixel centres in the object's frame, UNIT at its edges."""
    sine, cosine = SINE[angle], SINE[angle + 64]
    axis = (2 * np.arange(side, dtype=np.int32) + 1 - side) * UNIT // side
    x, y = axis[None, :], axis[:, None]
    return (x * cosine + y * sine) >> 12, ((y * cosine - x * sine) >> 12) * 256 // stretch


def _surface(rng: Generator, second: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """(side, side, 3) int32 colours: two tones with a clear difference, light falling across, a little grain."""
    first, other = _two_tones(rng)
    colour = np.where(second[..., None], other, first)
    slope = rng.integers(-80, 81, 2).tolist()
    light = 256 + (u * slope[0] + v * slope[1]) // UNIT
    grain = rng.integers(-10, 11, u.shape, dtype=np.int32)
    return np.clip(colour * light[..., None] // 256 + grain[..., None], 0, 255)


def _two_tones(rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    while True:
        first, other = rng.integers(20, 236, (2, 3), dtype=np.int32)
        if abs(first - other).sum() > 220:
            return first, other


# ---- ground and light ----------------------------------------------------------------------------------------------


def _background(rng: Generator, size: int) -> np.ndarray:
    """(size, size, 3) int32: two colours blended by noise and sometimes a weave, with strokes and patches on it."""
    low, high = rng.integers(30, 226, (2, 3), dtype=np.int32)
    blend = (_noise(rng, size, 3) * 2 + _noise(rng, size, 9) + _noise(rng, size, size // 3)) // 4
    if rng.integers(3) == 0:
        blend = (blend + _weave(rng, size)) // 2
    ground = low + (high - low) * blend[..., None] // 255
    image = Image.fromarray(ground.astype(np.uint8))
    pen = ImageDraw.Draw(image, "RGBA")
    for _ in range(rng.integers(3, 14)):
        tint = (*rng.integers(0, 256, 3).tolist(), int(rng.integers(60, 200)))
        x, y, dx, dy = rng.integers(-size // 2, size, 4).tolist()
        match rng.integers(3):
            case 0:
                pen.line([x, y, x + dx, y + dy], fill=tint, width=int(rng.integers(1, 5)))
            case 1:
                corners = rng.integers(-size // 6, size // 6, (4, 2)) + np.array([x, y])
                pen.polygon(corners.ravel().tolist(), fill=tint)
            case 2:
                start, end = rng.integers(0, 360, 2).tolist()
                pen.arc(
                    [x, y, x + abs(dx) + 4, y + abs(dy) + 4],
                    start,
                    end,
                    fill=tint,
                    width=int(rng.integers(1, 5)),
                )
    return np.asarray(image).astype(np.int32)


def _noise(rng: Generator, size: int, cells: int) -> np.ndarray:
    """(size, size) int32 in 0..255: a smooth random field with ``cells`` features across."""
    grid = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)).astype(np.int32)


def _weave(rng: Generator, size: int) -> np.ndarray:
    """(size, size) int32, 0 or 255: stripes or checks in a random direction."""
    angle, period = int(rng.integers(256)), int(rng.integers(4, 24))
    axis = np.arange(size, dtype=np.int32)
    along = (axis[None, :] * SINE[angle + 64] + axis[:, None] * SINE[angle]) >> 12
    across = (axis[:, None] * SINE[angle + 64] - axis[None, :] * SINE[angle]) >> 12
    cells = along // period + (across // period if rng.integers(2) else 0)
    return (cells & 1) * 255


def _photograph(rng: Generator, canvas: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: uneven light, sometimes a soft lens, sensor noise."""
    size = len(canvas)
    corners = Image.fromarray(rng.integers(60, 200, (2, 2), dtype=np.uint8))
    light = np.asarray(corners.resize((size, size), Image.Resampling.BILINEAR)).astype(np.int32)
    image = Image.fromarray(np.clip(canvas * light[..., None] // 128, 0, 255).astype(np.uint8))
    if rng.integers(4) == 0:
        image = image.filter(ImageFilter.BoxBlur(1))
    noise = int(rng.integers(2, 13))
    grain = rng.integers(-noise, noise + 1, canvas.shape, dtype=np.int16)
    return np.clip(np.asarray(image).astype(np.int16) + grain, 0, 255).astype(np.uint8)


def _log_uniform(rng: Generator, low: int, high: int) -> int:
    sides = [low]
    while (longer := sides[-1] + sides[-1] // 6) <= high:
        sides.append(longer)
    return sides[int(rng.integers(len(sides)))]


# ---- data sets -----------------------------------------------------------------------------------------------------


class Scenes(CocoDetection):
    """``num_images`` scenes of ``image_size`` x ``image_size`` pixels, held in memory.

    Items and attributes are those of :class:`CocoDetection`. Another ``split`` or ``seed`` gives other images of the
    same kind.
    """

    def __init__(
        self, num_images: int, image_size: int, seed: int, transform: Transform | None = None, *, split: str = "train"
    ) -> None:
        self._scenes = _draw_all(num_images, image_size, seed, split)
        self.transform = transform
        self._index(coco_index(_annotations(self._scenes, split)))

    def _image(self, index: int) -> Tensor:
        return torch.from_numpy(self._scenes[index].image).permute(2, 0, 1).contiguous()


def write_scenes(folder: str | Path, *, splits: Mapping[str, int], image_size: int, seed: int) -> None:
    """Writes scenes as files: ``images/<split>_<index>.png`` and ``annotations/<split>.json`` under ``folder``.

    ``splits`` has every split's name and its number of images, which are those of
    ``Scenes(count, image_size, seed, split=name)``.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for split, count in splits.items():
        scenes = _draw_all(count, image_size, seed, split)
        annotations = _annotations(scenes, split)
        for scene, entry in zip(scenes, annotations["images"], strict=True):
            Image.fromarray(scene.image).save(folder / "images" / entry["file_name"])
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(annotations), encoding="utf-8")


@lru_cache(maxsize=2)  # the runs of a demonstration see the same two splits; nobody writes to a drawn scene
def _draw_all(count: int, image_size: int, seed: int, split: str) -> list[Scene]:
    if count < 1:
        raise ValueError(f"the number of scenes must be at least 1, found {count} for {split}")
    if image_size < 64:
        raise ValueError(f"image_size must be at least 64 pixels, found {image_size}")
    return [draw_scene(seed, split, index, image_size) for index in range(count)]


def _annotations(scenes: list[Scene], split: str) -> dict[str, Any]:
    """The COCO annotations of ``scenes``; image ids count from 1."""
    size = len(scenes[0].image)
    images = [
        {"id": i, "file_name": f"{split}_{i:05}.png", "width": size, "height": size} for i in range(1, len(scenes) + 1)
    ]
    boxes = [
        (i, *annotation)
        for i, scene in enumerate(scenes, start=1)
        for annotation in zip(scene.labels, scene.boxes, scene.areas, strict=True)
    ]
    annotations = [
        {"id": i, "image_id": image_id, "category_id": label, "bbox": box, "area": area, "iscrowd": 0}
        for i, (image_id, label, box, area) in enumerate(boxes, start=1)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}
