"""What all of torchvision's detectors share: the transform before the backbone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from tardkd.detectors.base import InputBatch

Transformed = tuple[InputBatch, list[dict[str, Tensor]]]  # the batch and the targets in its pixels


@contextmanager
def recorded_inputs(transform: Any, on_inputs: Callable[[InputBatch], None]) -> Iterator[list[Transformed]]:
    """Record what the model's transform makes of a batch, and hand it on as soon as it is there."""
    mean, std = tuple(transform.image_mean), tuple(transform.image_std)
    transformed: list[Transformed] = []

    def record(module: nn.Module, args: tuple[Any, ...], output: tuple[ImageList, Any]) -> None:
        batch, resized_targets = output
        inputs = InputBatch(batch.tensors, batch.image_sizes, mean, std)
        transformed.append((inputs, resized_targets))
        on_inputs(inputs)

    handle = transform.register_forward_hook(record)
    try:
        yield transformed
    finally:
        handle.remove()


def input_size(transform: Any) -> float:
    """Nominal short side of the input in pixels."""
    return min(transform.fixed_size) if transform.fixed_size else transform.min_size[-1]


def input_scale(transform: Any, sizes: Tensor) -> Tensor:
    """Input pixels per image pixel (G, 2), as images of these widths and heights (G, 2) are resized in use."""
    if transform.fixed_size:
        return sizes.new_tensor(transform.fixed_size) / sizes
    short, long = sizes.amin(dim=1, keepdim=True), sizes.amax(dim=1, keepdim=True)
    return (transform.min_size[-1] / short).minimum(transform.max_size / long).expand(-1, 2)


def longest_aspect(transform: Any) -> float:
    """How many times as long as wide an image may be, for the resizing to leave a pixel of its width."""
    if transform.fixed_size:
        return math.inf
    return 0.99 * transform.max_size  # not quite: the sides are rounded down


def teacher_batch(
    transform: Any, dtype: torch.dtype, images: Sequence[Tensor], inputs: InputBatch, ratio: float
) -> ImageList:
    """The student's own batch where the teacher would have made the same, else one of its own.

    Args:
        transform: the teacher's.
        dtype: of the teacher's backbone.
        images: N x (3, H, W) in [0, 1].
        inputs: the student's.
        ratio: the teacher's input pixels per student-input pixel.
    """
    same_values = (tuple(transform.image_mean), tuple(transform.image_std)) == (inputs.mean, inputs.std)
    padded = all(side % transform.size_divisible == 0 for side in inputs.tensor.shape[-2:])
    if ratio == 1 and same_values and padded:
        return ImageList(inputs.tensor.to(dtype), inputs.sizes)
    sizes = [(round(height * ratio), round(width * ratio)) for height, width in inputs.sizes]
    resized = [
        F.interpolate(transform.normalize(image)[None], size, mode="bilinear", align_corners=False)[0]
        for image, size in zip(images, sizes)
    ]
    batch = transform.batch_images(resized, size_divisible=transform.size_divisible)
    return ImageList(batch.to(dtype), sizes)


def named(maps: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    """The levels of a pyramid, (N, C_l, H_l, W_l) each, by name; a backbone may return its only one bare."""
    return {"0": maps} if isinstance(maps, Tensor) else maps


PROBE = 256  # pixels: a side of the empty image by which the strides are found


def probe(backbone: nn.Module, size: tuple[int, int] = (PROBE, PROBE)) -> dict[str, Tensor]:
    """What the backbone makes of an empty image of this height and width: (1, C_l, H_l, W_l) by name."""
    was_training = backbone.training
    parameter = next(backbone.parameters())
    try:
        with torch.inference_mode():
            return named(backbone.eval()(parameter.new_zeros(1, 3, *size)))
    finally:
        backbone.train(was_training)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of the module's parameters."""
    return next(module.parameters()).dtype


def exact(boxes: Tensor) -> Tensor:
    """Boxes (R, 4) in float32 at least: torchvision's have fewer digits under autocast."""
    return boxes.to(torch.promote_types(boxes.dtype, torch.float32))
