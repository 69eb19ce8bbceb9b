"""transformers' DETR and what came of it as student or teacher; the models themselves are never changed.

Nothing of transformers is imported before a method needs it.
"""

from __future__ import annotations

from torch import nn

from tardkd.detectors.base import Detector

from .d_fine import DFineDetector
from .detr import DeformableDetrDetector, DetrDetector
from .queries import QueryDetector
from .rt_detr import RTDetrDetector

__all__ = ["DFineDetector", "DeformableDetrDetector", "DetrDetector", "QueryDetector", "RTDetrDetector", "detector_of"]

FAMILIES: dict[str, type[QueryDetector]] = {
    "RTDetrForObjectDetection": RTDetrDetector,
    "RTDetrV2ForObjectDetection": RTDetrDetector,
    "DFineForObjectDetection": DFineDetector,
    "DetrForObjectDetection": DetrDetector,
    "DeformableDetrForObjectDetection": DeformableDetrDetector,
}


def detector_of(model: nn.Module) -> Detector | None:
    """The model in the terms of its family; None if it is of another library, or no family here knows it."""
    for kind in type(model).__mro__:
        if kind.__module__.startswith("transformers.models.") and kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__](model)
    return None
