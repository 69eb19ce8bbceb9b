"""Where the parts of a detector are, for those who time, compile or examine them: torchvision's names end here."""

from __future__ import annotations

from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

PREDICTOR = "roi_heads.box_predictor."  # how the names of the tensors begin whose sizes depend on the classes


def backbone(model: GeneralizedRCNN) -> nn.Module:
    """Backbone and pyramid: what runs once an image."""
    return model.backbone


def box_head(model: GeneralizedRCNN) -> tuple[nn.Module, ...]:
    """What runs on pooled regions, in this order."""
    return model.roi_heads.box_head, model.roi_heads.box_predictor
