"""A detector's anchors as numbers, and how well they meet given objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Anchors:
    """Boxes of a few sizes and shapes that stand on a grid on every level of a pyramid, from 0 on."""

    sizes: tuple[tuple[float, ...], ...]  # of each level
    ratios: tuple[tuple[float, ...], ...]  # height to width, of each level
    strides: tuple[float, ...]  # input pixels from one place of a level's grid to the next

    def resized(self, sizes: Sequence[float]) -> Anchors:
        """The same shapes and places with one other size a level."""
        return Anchors(tuple((size,) for size in sizes), self.ratios, self.strides)

    def everywhere(self) -> Anchors:
        """The same sizes and shapes on a grid of single pixels: what overlap the strides take away."""
        return Anchors(self.sizes, self.ratios, (1.0,) * len(self.strides))

    def best_overlaps(self, boxes: Tensor, limits: Tensor) -> Tensor:
        """The largest IoU (G,) that any anchor has with each box.

        Of the anchors of one size and shape the one with the nearest centre overlaps most, so that only these are
        compared.

        Args:
            boxes: (G, 4) centre and size, in the model's input pixels.
            limits: (G, 2) width and height of the image that each box is on.
        """
        best = torch.zeros(len(boxes))
        box_sizes = boxes[:, None, 2:]  # (G, 1, 2)
        for scales, ratios, stride in zip(self.sizes, self.ratios, self.strides, strict=True):
            sizes = _shapes(scales, ratios)
            steps = (boxes[:, :2] / stride).round().clamp(min=0).minimum(((limits - 1) / stride).floor())
            distance = (boxes[:, :2] - steps * stride).abs()[:, None]  # (G, 1, 2)
            shared = torch.minimum(torch.minimum(box_sizes, sizes), (box_sizes + sizes) / 2 - distance)
            shared = shared.clamp(min=0).prod(dim=-1)  # (G, A)
            iou = shared / (box_sizes.prod(dim=-1) + sizes.prod(dim=-1) - shared)
            best = best.maximum(iou.amax(dim=1))
        return best


def _shapes(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Width and height (A, 2) of the anchors of a level, in whole pixels as torchvision rounds them."""
    stretch = torch.tensor(ratios, dtype=torch.float32).sqrt()[:, None, None]
    shape = torch.cat([1 / stretch, stretch], dim=2)  # (ratios, 1, 2)
    halves = shape * torch.tensor(sizes, dtype=torch.float32)[:, None] / 2
    return 2 * halves.flatten(0, 1).round()
