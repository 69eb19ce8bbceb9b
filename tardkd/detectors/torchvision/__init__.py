"""torchvision's detectors as student or teacher; the models themselves are never changed."""

from __future__ import annotations

from torch import nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from tardkd.detectors.base import Detector

from .two_stage import GeneralizedRCNNDetector

# The name that the class had before "adapter" came to mean a layer alone.
GeneralizedRCNNAdapter = GeneralizedRCNNDetector

__all__ = ["GeneralizedRCNN", "GeneralizedRCNNAdapter", "GeneralizedRCNNDetector", "detector_of"]


def detector_of(model: nn.Module) -> Detector | None:
    """The model in the terms of its family; None if it is of another library."""
    return GeneralizedRCNNDetector(model) if isinstance(model, GeneralizedRCNN) else None
