"""Training views of an image and its boxes, built from torchvision's v2 transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from .coco import Target, has_extent

GREY = 114  # what lies outside the image when a view shrinks or moves it

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of an image and its boxes, such as a v2.Transform


class DetectionTransform:
    """Applies v2 transforms to ``(image, target)``.

    Boxes move with the pixels and are clipped to the view; those left without extent go, with their labels. ``area``
    shrinks and grows with its box.

    All randomness comes from torch's global CPU generator, which the loader seeds per (seed, epoch, index).
    """

    def __init__(self, *steps: Step) -> None:
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


def build_transform(
    *,
    flip: float = 0.5,
    scale: Sequence[float] = (1.0, 1.0),
    shift: float = 0.0,
    photometric: bool = False,
    zoom_out: float = 1.0,
    iou_crop: bool = False,
    large_scale_jitter: Sequence[float] | None = None,
) -> DetectionTransform:
    """The usual training augmentation, in the order of the arguments.

    Args:
        flip: probability of a horizontal flip.
        scale: (smallest, largest) factor by which the content is resized about the centre, the image keeping its
            size. (Resizing the image itself would be undone by the detector, which resizes to its own ``min_size``.)
        shift: largest displacement, as a share of the image's width and height.
        photometric: random brightness, contrast, saturation, hue and channel order.
        zoom_out: half of the images are laid on a grey canvas whose sides are up to so many times as long (SSD: 4).
        iou_crop: SSD's crop, of sides from 0.3 on, which holds the centre of an object at least.
        large_scale_jitter: (smallest, largest) factor, such as (0.1, 2), by which the image is resized; then it is
            cropped or laid on grey, at a random place, so that its size is as before.
    """
    if not 0 <= flip <= 1:
        raise ValueError(f"flip must be a probability, found {flip}")
    if not (len(scale) == 2 and 0 < scale[0] <= scale[1]):
        raise ValueError(f"scale must be (smallest, largest) with 0 < smallest <= largest, found {scale}")
    if not 0 <= shift < 1:
        raise ValueError(f"shift must be in [0, 1), found {shift}")
    if not zoom_out >= 1:
        raise ValueError(f"zoom_out must be at least 1, found {zoom_out}")
    if large_scale_jitter is not None and not (
        len(large_scale_jitter) == 2 and 0 < large_scale_jitter[0] <= large_scale_jitter[1]
    ):
        raise ValueError(
            f"large_scale_jitter must be (smallest, largest) with 0 < smallest <= largest, found {large_scale_jitter}"
        )
    steps: list[Step] = []
    if flip:
        steps.append(v2.RandomHorizontalFlip(flip))
    if tuple(scale) != (1, 1) or shift:
        steps.append(
            v2.RandomAffine(
                degrees=0,
                translate=(shift, shift) if shift else None,
                scale=tuple(scale),
                fill=GREY,
                interpolation=v2.InterpolationMode.BILINEAR,
            )
        )
    if photometric:
        steps.append(v2.RandomPhotometricDistort())
    if zoom_out > 1:
        steps.append(v2.RandomZoomOut(fill=GREY, side_range=(1, zoom_out)))
    if iou_crop:
        steps.append(IoUCrop())
    if large_scale_jitter is not None:
        steps.append(LargeScaleJitter(large_scale_jitter))
    return DetectionTransform(*steps)


class IoUCrop(v2.RandomIoUCrop):
    """The crop of SSD. The boxes that it gives up come out without extent."""

    def forward(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        # It looks for a crop around an object, and for one of whole pixels.
        if len(boxes) == 0 or min(image.shape[-2:]) * self.min_scale < 1:
            return image, boxes
        return super().forward(image, boxes)


class LargeScaleJitter:
    """Resizes by a random factor, then crops or fills up to the size that the image had, at a random place.

    As in "Simple Copy-Paste" (arXiv 2012.07177), but for the canvas: there it is a square of 1024 pixels, here the
    detector resizes the view to its own size anyway.
    """

    def __init__(self, factors: Sequence[float]) -> None:
        self.factors = tuple(factors)

    def __call__(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        height, width = image.shape[-2:]
        least = 2 / min(height, width)  # a pixel must be left
        resize = v2.ScaleJitter((width, height), tuple(max(factor, least) for factor in self.factors))
        place = v2.RandomCrop((height, width), pad_if_needed=True, fill=GREY)
        return place(*resize(image, boxes))


def _area(boxes: Tensor) -> Tensor:
    return torch.prod(boxes[:, 2:] - boxes[:, :2], dim=1)
