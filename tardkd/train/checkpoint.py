"""Checkpoints: the plain student under ``model``, everything else that resuming needs beside it.

They are written to a temporary file in the same folder, synced and renamed, so that a crash leaves the one before
whole, and read by :mod:`tardkd.weights`, which executes nothing in them and notices what a disk has damaged since.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tardkd.weights import CheckpointError, read_content

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
    """A temporary file beside `path` for the body to write; then it is synced and takes the place of `path`.

    Whatever goes wrong, `path` is as it was and the temporary file is gone.
    """
    path = Path(path)
    temporary, replaced = path.with_name(path.name + ".tmp"), False
    try:
        yield temporary
        _sync(temporary)
        if previous is not None and path.exists():
            _keep(path, Path(previous))
        os.replace(temporary, path)
        replaced = True
        _sync_folder(path.parent)  # the rename itself must survive a power cut
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        kept = "; what it held before is untouched" if path.exists() and not replaced else ""
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; {free / 2**20:.0f} MiB are free in {path.parent}{kept}"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def write(content: Any, path: Path) -> None:
    """``torch.save``; raises the OSError that ended it, where torch itself speaks of a position in the file."""
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _keep(path: Path, previous: Path) -> None:
    """`path` under a second name, without copying it."""
    second = previous.with_name(previous.name + ".tmp")
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
        os.replace(second, previous)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        os.replace(path, previous)  # this file system has no links, so that for a moment there is `previous` alone
    finally:
        second.unlink(missing_ok=True)  # os.replace does nothing where both are names of one file


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that sync no folders
            raise


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


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """A digest of names, shapes and values: two state dicts with the same digest hold the same weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
