"""A detector's anchors as numbers, and how well they meet given objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from .parts import backbone

PROBE = 256  # pixels: a side of the empty image by which the strides are found


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
        for cells, stride in zip(AnchorGenerator(self.sizes, self.ratios).cell_anchors, self.strides, strict=True):
            sizes = cells[:, 2:] - cells[:, :2]  # (A, 2)
            steps = (boxes[:, :2] / stride).round().clamp(min=0).minimum(((limits - 1) / stride).floor())
            distance = (boxes[:, :2] - steps * stride).abs()[:, None]  # (G, 1, 2)
            shared = torch.minimum(torch.minimum(box_sizes, sizes), (box_sizes + sizes) / 2 - distance)
            shared = shared.clamp(min=0).prod(dim=-1)  # (G, A)
            iou = shared / (box_sizes.prod(dim=-1) + sizes.prod(dim=-1) - shared)
            best = best.maximum(iou.amax(dim=1))
        return best


def anchors_of(model: GeneralizedRCNN) -> Anchors:
    """Those that the model proposes regions from."""
    generator = model.rpn.anchor_generator
    return Anchors(generator.sizes, generator.aspect_ratios, tuple(_strides(model)))


def input_scale(model: GeneralizedRCNN, sizes: Tensor) -> Tensor:
    """Input pixels per image pixel (G,), as the model resizes images of these widths and heights (G, 2) in use."""
    transform = model.transform
    short, long = sizes.amin(dim=1), sizes.amax(dim=1)
    return (transform.min_size[-1] / short).minimum(transform.max_size / long)


def _strides(model: GeneralizedRCNN) -> list[float]:
    """Input pixels per cell of every level of the pyramid that has anchors."""
    was_training = model.training
    model.eval()
    parameter = next(model.parameters())
    with torch.inference_mode():
        levels = backbone(model)(parameter.new_zeros(1, 3, PROBE, PROBE))
    model.train(was_training)
    return [PROBE / level.shape[-1] for level in levels.values()]
