"""torchvision's detectors as student or teacher; the models themselves are never changed."""

from __future__ import annotations

from torch import nn
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD

from tardkd.detectors.base import Detector

from .dense import FCOSDetector, RetinaNetDetector, SSDDetector
from .two_stage import GeneralizedRCNNDetector

# The name that the class had before "adapter" came to mean a layer alone.
GeneralizedRCNNAdapter = GeneralizedRCNNDetector

__all__ = [
    "FCOSDetector",
    "GeneralizedRCNN",
    "GeneralizedRCNNAdapter",
    "GeneralizedRCNNDetector",
    "RetinaNetDetector",
    "SSDDetector",
    "detector_of",
]

DETECTORS: dict[type[nn.Module], type[Detector]] = {
    GeneralizedRCNN: GeneralizedRCNNDetector,
    RetinaNet: RetinaNetDetector,
    FCOS: FCOSDetector,
    SSD: SSDDetector,
}


def detector_of(model: nn.Module) -> Detector | None:
    """The model in the terms of its family; None if it is of another library."""
    return next((detector(model) for kind, detector in DETECTORS.items() if isinstance(model, kind)), None)
