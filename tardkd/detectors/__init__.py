"""Detector families: what tardkd needs of a detector, and how each family provides it."""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch import nn

from .base import Detector

# The name that `Detector` had before "adapter" came to mean the layer between the two models' channels alone.
DetectorAdapter = Detector

__all__ = ["Detector", "DetectorAdapter", "find", "for_model", "register"]

_registered: dict[type[nn.Module], Callable[[nn.Module], Detector]] = {}


def register(model_type: type[nn.Module], detector: Callable[[nn.Module], Detector]) -> None:
    """Teach :func:`for_model` a family of one's own, also in place of one that it knows.

    Args:
        model_type: the class of the models; models of classes that derive from it are meant as well.
        detector: makes a :class:`Detector` of such a model; usually a class that derives from it.
    """
    _registered[model_type] = detector


def find(model: nn.Module | Detector) -> Detector | None:
    """The model in the terms of its family; None if no family knows it."""
    if isinstance(model, Detector):
        return model
    for kind in type(model).__mro__:
        if kind in _registered:
            return _registered[kind](model)
    found = (family(model) for family in FAMILIES)
    return next((detector for detector in found if detector is not None), None)


def for_model(model: nn.Module | Detector) -> Detector:
    """The model in the terms of its family, ready to be a student or a teacher; a Detector is taken as it is.

    Raises:
        TypeError: no family knows the model; wrappers (DDP, ``torch.compile``) belong around the distiller.
    """
    detector = find(model)
    if detector is None:
        kind = type(model)
        raise TypeError(
            f"no adapter for a detector of type {kind.__module__}.{kind.__qualname__}; supported: {SUPPORTED}, given "
            "unwrapped, and what tardkd.detectors.register was told"
        )
    return detector


# --- the families -------------------------------------------------------------------------------------------

SUPPORTED = (
    "torchvision's GeneralizedRCNN (Faster, Mask and Keypoint R-CNN), RetinaNet, FCOS and SSD, transformers' DETR, "
    "Deformable DETR, RT-DETR, RT-DETRv2 and D-FINE, Detectron2's R-CNNs with FPN and RetinaNet"
)


def _torchvision(model: nn.Module) -> Detector | None:
    try:
        from .torchvision import detector_of
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        return None
    return detector_of(model)


def _transformers(model: nn.Module) -> Detector | None:
    if "transformers" not in sys.modules:  # which takes long to import, and has been where a model is one of its
        return None
    from .transformers import detector_of

    return detector_of(model)


def _detectron2(model: nn.Module) -> Detector | None:
    if not any(kind.__module__.startswith("detectron2.") for kind in type(model).__mro__):
        return None
    from .detectron2 import detector_of

    return detector_of(model)


FAMILIES: tuple[Callable[[nn.Module], Detector | None], ...] = (_torchvision, _transformers, _detectron2)
