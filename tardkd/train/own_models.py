"""Detectors of one's own: functions that a recipe names as package.module:function.

A recipe is written by the one who trains, who may name code. A checkpoint may come from anywhere, and reading one runs
no code that its reader has not named: in a recipe, or in the variable ``TARDKD_MODELS``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from tardkd.detectors import for_model
from tardkd.ops.spec import class_count

REFERENCE = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
SHIPPED = "tardkd.train.query_models"  # whose functions build models and do nothing else
VARIABLE = "TARDKD_MODELS"  # modules whose functions a checkpoint may name, separated by commas


class OwnModelError(ValueError):
    """A function that a recipe or checkpoint names cannot be called, or does not build what it should."""


def build_own(reference: str, num_classes: int, **options: Any) -> nn.Module:
    """The detector of that function for ``num_classes`` classes without the background.

    The function is called with the number that torchvision's constructors take: one more, for the background. It is
    given the ``options`` by their names.

    Raises:
        OwnModelError: there is no such function, it fails, or its detector is for other classes; says which.
    """
    function = _find(reference)
    try:
        model = function(num_classes + 1, **options)
    except Exception as error:
        raise OwnModelError(f"{reference}({num_classes + 1}) failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise OwnModelError(f"{reference} must return a detector (an nn.Module), got {type(model).__name__}")
    try:
        head = for_model(model).head
    except TypeError as error:
        raise OwnModelError(f"{reference}: {error}") from None
    count = None if head.widths is None else class_count(head.widths[0], head.activation)
    if count not in (None, num_classes):
        raise OwnModelError(
            f"{reference}({num_classes + 1}) built a detector of {count} classes beside the background, but the data "
            f"has {num_classes}: the function is called with the classes and the background, as torchvision counts"
        )
    return model


def check_named(reference: str | None, source: str | Path, recipes: str | None = None) -> None:
    """Refuse a function that the checkpoint ``source`` names and its reader does not.

    Args:
        reference: what the checkpoint names; None where it is none of one's own.
        source: what a message calls the checkpoint.
        recipes: what the recipe names.
    """
    if reference is None or reference == recipes:
        return
    module = reference.partition(":")[0]
    if module != SHIPPED and module not in os.environ.get(VARIABLE, "").split(","):
        raise OwnModelError(
            f"{source} is of a detector that {reference} builds. A checkpoint runs no code by itself: if you trust "
            f"that module, name it: {VARIABLE}={module}"
        )


def _find(reference: str) -> Callable[[int], Any]:
    """The function of that name; modules are looked for in the current folder, too."""
    name, _, attribute = reference.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise OwnModelError(
            f"{reference}: there is no module {error.name} in the current folder {os.getcwd()} or in Python's path"
        ) from error
    except Exception as error:
        raise OwnModelError(f"{reference}: {name} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise OwnModelError(f"{reference}: {name} has no function {attribute}")
    return function
