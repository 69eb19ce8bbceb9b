"""A detector with queries made ready for formats that know neither tardkd nor transformers."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tardkd.ops.spec import Activation

from .inputs import Preparation, to_pixels


class OneImageDetector(nn.Module):
    """A copy in eval mode that is called as torchvision's detectors are, with a list of one image.

    In a trace the image's size is a constant, and so is all that follows from it.

    Args:
        model: one of transformers', which answers with "logits" (N, Q, columns) and "pred_boxes" (N, Q, 4).
        preparation: how the image becomes its input.
        activation: what turns logits into probabilities; of a softmax the last column is for no object.
    """

    def __init__(self, model: Any, preparation: Preparation, activation: Activation) -> None:
        super().__init__()
        self.is_softmax = activation == "softmax"
        self.model = copy.deepcopy(model).eval()
        self.preparation = preparation
        # Else it would take anchors of that size for an image of any other.
        self.model.config.anchor_image_size = None

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        [image] = images
        height, width = int(image.shape[-2]), int(image.shape[-1])  # in a trace they are tensors
        size = self.preparation.size(height, width)
        rows, columns = self.preparation.padded(*size)
        inner = image[None]
        if size != (height, width):
            inner = F.interpolate(inner, size, mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.preparation.mean, self.preparation.std))
        padding = (0, columns - size[1], 0, rows - size[0])
        mask = F.pad(torch.ones(1, *size, dtype=torch.int64), padding)
        output = self.model(pixel_values=F.pad((inner - mean) / std, padding), pixel_mask=mask, return_dict=True)
        # The padded input is that many pixels of the image as it was given.
        boxes = to_pixels(output.pred_boxes[0], rows * height / size[0], columns * width / size[1])
        boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height]))
        if self.is_softmax:
            scores, labels = output.logits[0].softmax(1)[:, :-1].max(1)
            return [{"boxes": boxes, "labels": labels + 1, "scores": scores}]
        queries, classes = output.logits.shape[1:]
        scores, places = output.logits[0].sigmoid().flatten().topk(int(queries))
        return [{"boxes": boxes[places // classes], "labels": places % classes + 1, "scores": scores}]
