"""Checkpoints: the plain student under ``model``, everything else that resuming needs beside it.

They are written to a temporary file in the same folder, synced and renamed, so that a crash leaves the one before
whole, and read with ``weights_only=True``, so that nothing in them is ever executed. What a disk has damaged since is
noticed: torch writes a checksum of every record but does not look at it, so it is looked at here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "tardkd checkpoint 1"
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"  # in a run's folder
FOREIGN = "it is no file that torch.save wrote"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, written or used; the message names the file and the reason."""


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
        os.replace(path, previous)  # a file system without links: for a moment there is `previous` alone
    finally:
        second.unlink(missing_ok=True)  # two names of one file are not renamed into one


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
    state = load_any(path)
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


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], list[str] | None]:
    """The tensors of a checkpoint, a plain state dict or a .safetensors file, and their classes if it tells them."""
    state = load_any(path)
    tensors = state.get("model", state)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path} does not hold a state dict of tensors")
    return tensors, classes_of(state)


def classes_of(state: dict[str, Any]) -> list[str] | None:
    """The class names in what load_any returned, if it tells them."""
    classes = state.get("classes")
    told = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    return classes if told else None


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Of names, shapes and values: two state dicts with the same one hold the same weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_any(path: str | Path) -> dict[str, Any]:
    """Read a dict that torch.save wrote, one of our checkpoints or a plain state dict, without executing anything.

    A .safetensors file gives its tensors under ``model`` and, where it tells them, its ``classes``.
    """
    try:
        state = _load_safetensors(path) if Path(path).suffix == ".safetensors" else _load_torch(path)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint at {path}") from None
    except CheckpointError:
        raise
    except Exception as error:  # whatever the readers of zip, pickle and tensors meet in a file that is none of theirs
        raise CheckpointError(f"cannot read {path} as a checkpoint: {_reason(error)}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a dict of tensors")
    return state


def _load_torch(path: str | Path) -> Any:
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        raise ValueError("it is empty")
    if start == b"PK\3\4":
        _check_records(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of files that are refused anyhow
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_records(path: str | Path) -> None:
    """Read every record against its checksum, which torch.load does not."""
    with zipfile.ZipFile(path) as archive:
        # All are zero where the user told torch not to compute them.
        if any(record.CRC for record in archive.infolist()):
            damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"the record {damaged} does not fit its checksum")


def _load_safetensors(path: str | Path) -> dict[str, Any]:
    with safetensors().safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file}
        metadata = file.metadata() or {}
    return {"model": tensors, "classes": json.loads(metadata.get("classes", "null"))}


def safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise CheckpointError("a .safetensors file needs the package safetensors: pip install safetensors") from None
    return safetensors


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # of which torch says at length how to run it nevertheless
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        return f"it asks to run {wanted[1]}, which is never done" if wanted else FOREIGN
    if isinstance(error, zipfile.BadZipFile):
        return f"it is damaged or cut short: {error}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    told = isinstance(error, (RuntimeError, ValueError))  # others, such as a KeyError, come from reading on blindly
    return str(error).strip().partition("\n")[0] if told else FOREIGN
