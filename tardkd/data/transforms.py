"""Training views of an image and its boxes, built from torchvision's v2 transforms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from .coco import Target, has_extent

GREY = 114  # what lies outside the image when a view shrinks or moves it


class DetectionTransform:
    """Applies v2 transforms to ``(image, target)``: boxes move with the pixels, are clipped to the view, and those
    left without extent go, with their labels. ``area`` shrinks and grows with its box.

    All randomness comes from torch's global CPU generator, which the loader seeds per (seed, epoch, index).
    """

    def __init__(self, *steps: v2.Transform) -> None:
        self.steps = steps

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        before = target["boxes"]
        boxes = tv_tensors.BoundingBoxes(before, format="XYXY", canvas_size=tuple(image.shape[-2:]))
        view = tv_tensors.Image(image)
        for step in self.steps:
            view, boxes = step(view, boxes)
        view, after = view.as_subclass(Tensor), boxes.as_subclass(Tensor)
        keep = has_extent(after)
        target = {**target, "boxes": after, "area": target["area"] * _area(after) / _area(before)}
        per_box = ("boxes", "labels", "area", "iscrowd")
        return view, {key: value[keep] if key in per_box else value for key, value in target.items()}


def build_transform(*, flip: float = 0.5, scale: Sequence[float] = (1.0, 1.0), shift: float = 0.0,
                    photometric: bool = False) -> DetectionTransform:
    """The usual training augmentation.

    Args:
        flip: probability of a horizontal flip.
        scale: (smallest, largest) factor by which the content is resized about the centre, the image keeping its
            size. (Resizing the image itself would be undone by the detector, which resizes to its own ``min_size``.)
        shift: largest displacement, as a share of the image's width and height.
        photometric: random brightness, contrast, saturation, hue and channel order.
    """
    if not 0 <= flip <= 1:
        raise ValueError(f"flip must be a probability, found {flip}")
    if not (len(scale) == 2 and 0 < scale[0] <= scale[1]):
        raise ValueError(f"scale must be (smallest, largest) with 0 < smallest <= largest, found {scale}")
    if not 0 <= shift < 1:
        raise ValueError(f"shift must be in [0, 1), found {shift}")
    steps: list[v2.Transform] = []
    if flip:
        steps.append(v2.RandomHorizontalFlip(flip))
    if tuple(scale) != (1, 1) or shift:
        steps.append(v2.RandomAffine(degrees=0, translate=(shift, shift) if shift else None,
                                     scale=tuple(scale), fill=GREY,
                                     interpolation=v2.InterpolationMode.BILINEAR))
    if photometric:
        steps.append(v2.RandomPhotometricDistort())
    return DetectionTransform(*steps)


def _area(boxes: Tensor) -> Tensor:
    return torch.prod(boxes[:, 2:] - boxes[:, :2], dim=1)
