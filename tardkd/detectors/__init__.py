"""Detector families: what tardkd needs of a detector, and how each family provides it."""

from __future__ import annotations

from torch import nn

from .base import DetectorAdapter

__all__ = ["DetectorAdapter", "for_model"]


def for_model(model: nn.Module) -> DetectorAdapter:
    """The adapter of ``model``'s family.

    Raises:
        TypeError: no adapter knows the model; wrappers (DDP, ``torch.compile``) belong around the distiller.
    """
    try:
        from .torchvision import GeneralizedRCNN, GeneralizedRCNNAdapter
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
    else:
        if isinstance(model, GeneralizedRCNN):
            return GeneralizedRCNNAdapter(model)
    kind = type(model)
    raise TypeError(
        f"no adapter for a detector of type {kind.__module__}.{kind.__qualname__}; "
        "supported: torchvision's GeneralizedRCNN (Faster, Mask and Keypoint R-CNN), given unwrapped"
    )
