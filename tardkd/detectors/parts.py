"""Where the parts of a detector are, for those who time, compile or examine them: torchvision's names end here."""

from __future__ import annotations

import math

from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

PREDICTOR = "roi_heads.box_predictor."  # how the names of the tensors begin whose sizes depend on the classes


def backbone(model: GeneralizedRCNN) -> nn.Module:
    """Backbone and pyramid: what runs once an image."""
    return model.backbone


def box_head(model: GeneralizedRCNN) -> tuple[nn.Module, ...]:
    """What runs on pooled regions, in this order."""
    return model.roi_heads.box_head, model.roi_heads.box_predictor


def heads(model: nn.Module) -> tuple[nn.Module, ...]:
    """What puts out the numbers that detections are made of; none of a model that is not one of torchvision's."""
    return (model.rpn.head, model.roi_heads.box_predictor) if isinstance(model, GeneralizedRCNN) else ()


def longest_aspect(model: nn.Module) -> float:
    """How many times as long as wide an image may be, for the model's resizing to leave a pixel of its width."""
    if not isinstance(model, GeneralizedRCNN):
        return math.inf
    return 0.99 * model.transform.max_size  # not quite: the sides are rounded down
