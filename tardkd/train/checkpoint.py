"""Checkpoints: the plain student under ``model``, everything else that resuming needs beside it.

They are written to a temporary file in the same folder, synced and renamed, so that a crash leaves the previous one
whole, and read with ``weights_only=True``, so that nothing in them is ever executed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

FORMAT = "tardkd checkpoint 1"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or used; the message names the file and the reason."""


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain Python values) so that `path` always holds a complete checkpoint."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def load(path: str | Path) -> dict[str, Any]:
    """Read one of our checkpoints onto the CPU; raises CheckpointError for anything else."""
    state = load_any(path)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version of tardkd: its format is "
                              f"{state.get('format')!r}, expected {FORMAT!r}")
    return state


def load_any(path: str | Path) -> dict[str, Any]:
    """Read a dict that torch.save wrote, one of our checkpoints or a plain state dict, without executing anything."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint at {path}") from None
    except Exception as error:  # whatever torch's zip, pickle and tensor readers meet in a file that is none of theirs
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"cannot read {path} as a checkpoint: {reason}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a dict of tensors")
    return state
