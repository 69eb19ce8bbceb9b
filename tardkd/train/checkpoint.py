"""Checkpoints: the plain student under ``model``, everything else that resuming needs beside it.

They are written by :mod:`tardkd.files`, so that a crash leaves the one before whole, and read by
:mod:`tardkd.weights`, which executes nothing in them and notices what a disk has damaged since. What a file of the
right format lacks is told here, before anybody uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tardkd import files
from tardkd.weights import (
    CheckpointError,
    fingerprint,
    from_content,
    is_text,
    read_content,
)

__all__ = ["BEST", "FORMAT", "LAST", "PREVIOUS", "CheckpointError", "fingerprint", "load", "load_last", "save"]

FORMAT = "tardkd checkpoint 1"
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"  # in a run's folder


# ---- writing -------------------------------------------------------------------------------------------------------


def save(path: str | Path, state: dict[str, Any], *, previous: str | Path | None = None) -> None:
    """Write `state` (tensors and plain Python values) so that `path` always holds a complete checkpoint.

    What `path` held before is kept as `previous`, for the day when the disk has damaged `path`.

    Raises:
        CheckpointError: it could not be written, as on a full disk; `path` and `previous` are as they were.
    """
    with replacing(path, previous=previous) as temporary:
        write({"format": FORMAT, **state}, temporary)


@contextmanager
def replacing(path: str | Path, *, previous: str | Path | None = None) -> Iterator[Path]:
    """As :func:`tardkd.files.replacing`, but what cannot be written is a CheckpointError."""
    try:
        with files.replacing(path, previous=previous) as temporary:
            yield temporary
    except files.UnwritableFileError as error:
        raise CheckpointError(str(error)) from None


def write(content: Any, path: Path) -> None:
    """``torch.save``; raises the OSError that ended it, where torch itself speaks of a position in the file."""
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


# ---- reading -------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> dict[str, Any]:
    """Read one of our checkpoints onto the CPU; raises CheckpointError for anything else."""
    state = read_content(path)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a checkpoint of this version of tardkd: its format is "
            f"{state.get('format')!r}, expected {FORMAT!r}"
        )
    return state


def load_trained(path: str | Path) -> dict[str, Any]:
    """The same, with what is needed to build the student again: ``model``, ``classes`` and ``config``.

    Raises:
        CheckpointError: it cannot be read, or one of these is missing or of another kind.
    """
    state = load(path)
    check_trained(state, path)
    return state


def check_trained(state: Mapping[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint without a trained student."""
    require(state, path, "config", dict, "the configuration of its run")
    require(state, path, "model", dict, "the student's tensors")
    classes = require(state, path, "classes", list, "the names of the classes")
    if not classes or not all(map(is_text, classes)) or len(set(classes)) < len(classes):
        raise CheckpointError(f"{path} is damaged: its classes must be different names, found {classes!r:.80}")
    from_content({"model": state["model"]}, str(path))


def require(state: Mapping[str, Any], path: str | Path, key: str, kind: type | tuple[type, ...], what: str) -> Any:
    """The value of a key that a checkpoint must have.

    Raises:
        CheckpointError: it is missing, or not of that kind; the message says `what` it would have been.
    """
    if key not in state:
        raise CheckpointError(f"{path} is not whole: it lacks {key!r}, {what}")
    value = state[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise CheckpointError(f"{path} is damaged: {key!r}, {what}, is of the type {type(value).__name__}")
    return value


def load_last(folder: str | Path) -> dict[str, Any]:
    """The last checkpoint of the run in `folder`; where it cannot be read the error says which other one can."""
    folder = Path(folder)
    try:
        return load(folder / LAST)
    except CheckpointError as error:
        for name in (PREVIOUS, BEST):
            try:
                step = load(folder / name).get("step")
            except CheckpointError:
                continue
            raise CheckpointError(
                f"{error}; {folder / name} of step {step} is whole, to go on from there: "
                f"cp {folder / name} {folder / LAST}"
            ) from None
        raise
