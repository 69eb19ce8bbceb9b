"""From images and boxes in pixels to what transformers' detectors are called with, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tardkd.detectors.base import Batch, InputBatch

UNCHANGED = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Preparation:
    """How images in [0, 1] become a batch: resized with their aspect ratio kept, normalised, padded on one side."""

    mean: tuple[float, ...]  # of the normalisation, one value a channel
    std: tuple[float, ...]  # of the normalisation, one value a channel
    min_size: int  # pixels that the shorter side gets,
    max_size: int  # unless the longer side would then be longer than this
    multiple: int = 32  # that the padded sides are multiples of

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image gets."""
        scale = min(self.min_size / min(height, width), self.max_size / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def padded(self, height: float, width: float) -> tuple[int, int]:
        """(height, width) of a batch that holds images up to this size."""
        rows, columns = (-(-round(side) // self.multiple) * self.multiple for side in (height, width))
        return rows, columns

    def batch(
        self,
        images: Sequence[Tensor],
        dtype: torch.dtype,
        sizes: Sequence[tuple[int, int]] | None = None,
        padded: tuple[int, int] | None = None,
    ) -> InputBatch:
        """A batch of images.

        Args:
            images: N x (3, H, W) in [0, 1].
            dtype: of the batch.
            sizes: N x (height, width) that the images get, where this is not :meth:`size`.
            padded: (height, width) of the batch, where it is not as small as can be.
        """
        sizes = [self.size(*image.shape[-2:]) for image in images] if sizes is None else list(sizes)
        height, width = padded or self.padded(*map(max, zip(*sizes)))
        mean, std = (images[0].new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        tensor = torch.zeros(len(images), 3, height, width, dtype=dtype, device=images[0].device)
        for row, image, size in zip(tensor, images, sizes):
            if tuple(image.shape[-2:]) != size:
                image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
            row[:, : size[0], : size[1]] = (image - mean) / std
        return InputBatch(tensor, sizes, self.mean, self.std)

    def fits(self, inputs: InputBatch) -> bool:
        """Whether a batch of another model is what this one would have made of the images at their size there."""
        same_values = (self.mean, self.std) == (inputs.mean, inputs.std)
        return same_values and all(side % self.multiple == 0 for side in inputs.tensor.shape[-2:])

    def images(self, inputs: InputBatch) -> list[Tensor]:
        """What :meth:`batch` was given, N x (3, H, W) in [0, 1], at the size that it had there."""
        tensor = inputs.tensor
        if (self.mean, self.std) != UNCHANGED:
            mean, std = (tensor.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
            tensor = tensor * std + mean
        return [image[:, :height, :width] for image, (height, width) in zip(tensor, inputs.sizes)]


@dataclass
class ReadCall(Batch):
    """A call of a detector, by its own keywords or with images and targets as torchvision's detectors are called."""

    inputs: InputBatch = field(kw_only=True)
    by_keywords: bool = field(kw_only=True)
    wants_tuple: bool = field(default=False, kw_only=True)  # whether it was called with return_dict=False


# --- boxes: (G, 4), relative centre and size against corners in pixels ----------------------------------------


def to_pixels(boxes: Tensor, height: float, width: float) -> Tensor:
    """(..., 4) centre and size, as shares of ``height`` and ``width``, as xyxy in float32 at least."""
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    centre, size = boxes[..., :2], boxes[..., 2:]
    corners = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
    return corners * corners.new_tensor([width, height, width, height])


def to_shares(boxes: Tensor, height: float, width: float) -> Tensor:
    """(..., 4) xyxy as centre and size, as shares of ``height`` and ``width``."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1) / boxes.new_tensor([width, height, width, height])


# --- labels ---------------------------------------------------------------------------------------------------


def labels_from_zero(targets: Sequence[Mapping[str, Any]], classes: int) -> list[Tensor]:
    """N x (G,): torchvision's labels, 1 to K, as transformers', 0 to K - 1.

    Raises:
        ValueError: a label on the CPU is none of these; those on a GPU are looked at together with the boxes.
    """
    for number, target in enumerate(targets):
        labels = target["labels"]
        if labels.is_cuda:
            continue
        wrong = ((labels < 1) | (labels > classes)).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"image {number}: box {wrong[0]} has the label {int(labels[wrong[0]])}; called with images and "
                f"targets, the student takes labels from 1 to {classes}, its number of classes, as torchvision's "
                "detectors do"
            )
    return [target["labels"] - 1 for target in targets]


def mask_of(inputs: InputBatch) -> Tensor:
    """(N, H, W) int64: 1 where a batch has an image, 0 in the padding."""
    mask = torch.zeros(inputs.tensor[:, 0].shape, dtype=torch.int64, device=inputs.tensor.device)
    for row, (height, width) in zip(mask, inputs.sizes):
        row[:height, :width] = 1
    return mask


def sizes_in(mask: Tensor) -> list[tuple[int, int]]:
    """N x (height, width) of the images in a mask (N, H, W)."""
    filled = mask.bool()
    heights, widths = filled.any(2).sum(1), filled.any(1).sum(1)
    return [(height, width) for height, width in torch.stack([heights, widths], dim=1).tolist()]
