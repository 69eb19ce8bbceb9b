"""The anchors of a model's pyramid, in the order of its places."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN, RetinaNet

from tardkd.detectors.base import InputBatch


def level_anchors(model: FasterRCNN | RetinaNet, inputs: InputBatch, features: Sequence[Tensor]) -> list[Tensor]:
    """The anchors of the levels ``features``, L x (N, C, H_l, W_l), as L x (H_l, W_l, A, 4) xyxy in input pixels."""
    generator = (model.rpn if isinstance(model, FasterRCNN) else model).anchor_generator
    sizes = [level.shape[-2:] for level in features]
    strides = [
        [torch.tensor(round(whole / part)) for whole, part in zip(inputs.tensor.shape[-2:], size)] for size in sizes
    ]
    cells = [cell.to(features[0].device) for cell in generator.cell_anchors[: len(features)]]
    levels = []
    for size, stride, cell in zip(sizes, strides, cells):
        y, x = (torch.arange(length) * step for length, step in zip(size, stride))
        corner = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1)  # (H, W, 2) xy
        levels.append(torch.cat([corner, corner], -1)[:, :, None].to(cell) + cell)
    return levels
