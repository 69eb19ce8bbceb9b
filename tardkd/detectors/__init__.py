"""Detector families: what tardkd needs of a detector, and how each family provides it."""

from __future__ import annotations

from torch import nn

from .base import Detector

# The name that `Detector` had before "adapter" came to mean the layer between the two models' channels alone.
DetectorAdapter = Detector

__all__ = ["Detector", "DetectorAdapter", "for_model"]


def for_model(model: nn.Module) -> Detector:
    """The model in the terms of its family, ready to be a student or a teacher.

    Raises:
        TypeError: no family knows the model; wrappers (DDP, ``torch.compile``) belong around the distiller.
    """
    try:
        from .torchvision import GeneralizedRCNN, GeneralizedRCNNDetector
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
    else:
        if isinstance(model, GeneralizedRCNN):
            return GeneralizedRCNNDetector(model)
    kind = type(model)
    raise TypeError(
        f"no adapter for a detector of type {kind.__module__}.{kind.__qualname__}; "
        "supported: torchvision's GeneralizedRCNN (Faster, Mask and Keypoint R-CNN), given unwrapped"
    )
