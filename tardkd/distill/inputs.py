"""Images and targets as they are often given wrongly: what would train all the same, and learn nothing, is named.

Faults that are certain are errors, those that are only likely a warning, once.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tardkd.detectors.base import HeadSettings, InputBatch
from tardkd.ops.spec import class_count, first_class_label

from .late import LateReader

IMAGE_STEPS = 3  # steps whose images are looked at: to read every pixel takes time, and loaders do not change
GPU_STEPS = 16  # steps whose targets are looked at where they are on a GPU
OVERSHOOT = 0.1  # what a resize with a sharp filter may add to the range of an image, as a share of it

Targets = Sequence[Mapping[str, Any]]


class InputCheck:
    """Looks at the batches of a training.

    Targets on the CPU are looked at in every step, those on a GPU in the first steps: the first time it is waited for,
    because a label beyond the head's classes would end in an assertion on the device, and later it is not.
    """

    def __init__(self) -> None:
        self._reader = LateReader()
        self._steps = 0  # begun so far
        self._has_warned = False

    def before(self, images: Sequence[Tensor], targets: Targets, head: HeadSettings) -> None:
        """Look at a batch that the student is about to see.

        Args:
            images: N x (3, H, W).
            targets: N dicts with "boxes" (G, 4) and "labels" (G,).
            head: the student's.

        Raises:
            TypeError: images are integers.
            ValueError: a box or a label cannot be right; names the image and the box. On a GPU it may be one of the
                step before.
        """
        self.settle()
        self._steps += 1
        check_types(images)
        if not is_well_formed(targets):
            return  # the detector itself says what is missing
        rows = as_rows(targets)
        if rows.is_cuda and self._steps > GPU_STEPS:
            return
        places = _places(targets)
        self._reader.read(rows, partial(_raise_first, places, head), wait=self._steps == 1)

    def after(self, images: Sequence[Tensor], inputs: InputBatch) -> None:
        """Look at the range of ``images``, N x (3, H, W), now that it is known how the student normalises them."""
        if self._steps <= IMAGE_STEPS and not self._has_warned:
            self._reader.read(image_range(images), partial(self._warn, inputs))

    def settle(self) -> None:
        """Raise or warn of what has not been read yet."""
        self._reader.settle()

    def _warn(self, inputs: InputBatch, low_and_high: list[float]) -> None:
        low, high = low_and_high
        fault = range_fault(low, high, inputs)
        if fault and not self._has_warned:
            self._has_warned = True
            warnings.warn(fault, stacklevel=2)


def check_types(images: Sequence[Tensor]) -> None:
    """Raise a TypeError where images are integers."""
    for number, image in enumerate(images):
        if not image.is_floating_point():
            raise TypeError(
                f"image {number} is {str(image.dtype).removeprefix('torch.')}; images must be floating point in "
                "[0, 1]: image.float() / 255"
            )


# --- targets ------------------------------------------------------------------------------------------------


def is_well_formed(targets: Targets) -> bool:
    """Whether every image has one label a box, all on one device."""
    for target in targets:
        boxes, labels = target.get("boxes"), target.get("labels")
        if not (isinstance(boxes, Tensor) and isinstance(labels, Tensor)):
            return False
        if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1] or boxes.device != labels.device:
            return False
    return len(targets) > 0


def as_rows(targets: Targets) -> Tensor:
    """The boxes and labels of all images as (G, 5) [x1, y1, x2, y2, label], float64."""
    boxes = torch.cat([target["boxes"].detach() for target in targets]).double()
    return torch.cat([boxes, torch.cat([target["labels"] for target in targets])[:, None]], dim=1)


def _places(targets: Targets) -> list[tuple[int, str]]:
    """How many boxes each image has, and what a message calls the image."""
    places = []
    for number, target in enumerate(targets):
        image_id = target.get("image_id")
        known = isinstance(image_id, (int, str)) or (isinstance(image_id, Tensor) and not image_id.is_cuda)
        name = f" (image_id {image_id.tolist() if isinstance(image_id, Tensor) else image_id})" if known else ""
        places.append((len(target["labels"]), f"image {number}{name}"))
    return places


def _raise_first(places: list[tuple[int, str]], head: HeadSettings, rows: list[list[float]]) -> None:
    fault = target_fault(places, head, rows)
    if fault:
        raise ValueError(fault)


def batch_fault(targets: Targets, head: HeadSettings) -> str | None:
    """What is wrong with the targets of a batch, in words; the device is waited for."""
    return target_fault(_places(targets), head, as_rows(targets).tolist())


def target_fault(places: list[tuple[int, str]], head: HeadSettings, rows: list[list[float]]) -> str | None:
    """The first box without extent or label without a class, in words.

    Args:
        places: of each image its number of rows and its name.
        head: the student's.
        rows: G of [x1, y1, x2, y2, label].
    """
    lowest = first_class_label(head.background)
    highest = None if head.widths is None else lowest + class_count(head.widths[0], head.activation) - 1
    row = 0
    for count, image in places:
        for box in range(count):
            x1, y1, x2, y2, label = rows[row]
            row += 1
            if x2 <= x1 or y2 <= y1:
                return f"{image}: box {box} {_box(rows[row - 1])} has x2 <= x1 or y2 <= y1; {_advice_on_boxes(rows)}"
            if label < lowest or (highest is not None and label > highest):
                return f"{image}: box {box} has the label {label:g}; {_advice_on_labels(head, int(label))}"
    return None


def _box(row: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:g}' for value in row[:4])}]"


def _advice_on_boxes(rows: list[list[float]]) -> str:
    flat = sum(x2 <= x1 or y2 <= y1 for x1, y1, x2, y2, _ in rows)
    wanted = "boxes must be [x1, y1, x2, y2]"
    if 2 * flat > len(rows):
        return f"so have {flat} of the batch's {len(rows)}: {wanted}, and these look like [x, y, width, height]"
    return f"{wanted}: is it [x, y, width, height]? Else mend it or leave it out"


def _advice_on_labels(head: HeadSettings, label: int) -> str:
    lowest = first_class_label(head.background)
    if head.background == "first" and label == 0:
        return "0 is the background: labels of classes count from 1"
    if head.widths is None:
        return f"labels of classes count from {lowest}"
    count = class_count(head.widths[0], head.activation)
    return (
        f"the student's head has {count} classes beside the background ({head.widths[0]} logits), whose labels are "
        f"{lowest} to {lowest + count - 1}"
    )


# --- images -------------------------------------------------------------------------------------------------


def image_range(images: Sequence[Tensor]) -> Tensor:
    """(2,) the smallest and the largest value of the images, N x (3, H, W)."""
    low, high = zip(*(image.detach().aminmax() for image in images))
    return torch.stack([torch.stack(low).amin(), torch.stack(high).amax()]).float()


def range_fault(low: float, high: float, inputs: InputBatch) -> str | None:
    """What is wrong with images of values from ``low`` to ``high``, in words.

    A model with a mean above 1 is made for images in [0, 255]; one that does not normalise at all takes what it is
    given.
    """
    if not any(inputs.mean) and all(value == 1 for value in inputs.std):
        return None
    white = 255.0 if max(inputs.mean) > 1 else 1.0
    found = f"images have values from {low:.3g} to {high:.3g}, but the student normalises images in [0, {white:g}]"
    if low < -OVERSHOOT * white:
        return f"{found} itself: they seem to be normalised twice; give them as they are"
    if high > 2 * white:
        return f"{found}: divide them by 255"
    if white > 1 and high <= 1 + OVERSHOOT:
        return f"{found}: multiply them by 255"
    return None
