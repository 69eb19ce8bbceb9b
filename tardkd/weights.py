"""Files of weights: one way to read them, and one way to say whether they fit a model.

A file is read onto the CPU with ``weights_only=True``, so that nothing in it is ever executed. What a disk has damaged
is noticed: torch writes a checksum of every record but never compares it, so it is compared here. A file that does not
hold what it must is an error that names the file, whatever it holds instead.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FOREIGN = "it is no file that torch.save wrote"
DOS_FOLDER = 0x10  # in the attributes of a record of an archive
SHOWN = 5  # names of tensors in a message
COUNTER = "num_batches_tracked"  # of BatchNorm: no output depends on it, and frozen BatchNorm has none


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, written or used; the message names the file and the reason.

    What ``torch.load`` or Python itself would have raised for the same reason is a base of each of its kinds below, so
    that a caller who expects that one catches it, too.
    """


class MissingFileError(CheckpointError, FileNotFoundError):
    """There is no such file."""


class UnreadableFileError(CheckpointError, pickle.UnpicklingError):
    """The file is damaged, of another kind, or asks to run code."""


class NoStateDictError(CheckpointError, ValueError):
    """The file can be read, but names no tensors."""


class NonFiniteWeightsError(CheckpointError):
    """Weights that hold a NaN or an infinity."""


@dataclass(frozen=True)
class Weights:
    """The tensors of a model by their names, and what the file that they come from tells beside them."""

    source: str  # what to call them in a message
    tensors: Mapping[str, Tensor]
    classes: list[str] | None  # names in the order of the labels, where the file tells them
    content: Mapping[str, Any]  # everything the file holds; of a checkpoint also its configuration


@dataclass(frozen=True)
class Fit:
    """How the tensors of a file compare with those of a model."""

    source: str
    total: int  # the model's tensors
    matched: int  # those of them that the file fills
    parameters: float  # the share of the model's numbers that these hold
    missing: list[str]  # names that the file lacks
    unexpected: list[str]  # names that the model lacks
    of_another_shape: dict[str, str]  # name: what both sides have, in words

    @property
    def is_complete(self) -> bool:
        return not (self.missing or self.unexpected or self.of_another_shape)

    def describe(self) -> str:
        """What does not fit, in words."""
        groups = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": [f"{name} {shapes}" for name, shapes in self.of_another_shape.items()],
        }
        return "; ".join(f"{len(names)} {what}: {_first(names)}" for what, names in groups.items() if names)


class MisfitError(ValueError):
    """Weights that do not fit a model; `fit` says where."""

    def __init__(self, message: str, fit: Fit) -> None:
        super().__init__(message)
        self.fit = fit


# ---- reading -------------------------------------------------------------------------------------------------------


def read(path: str | PathLike[str]) -> Weights:
    """The tensors of a checkpoint, a plain state dict or a .safetensors file.

    Raises:
        CheckpointError: the file cannot be read, or holds no state dict.
    """
    return from_content(read_content(path), str(path))


def from_content(content: Mapping[str, Any], source: str) -> Weights:
    """The same from what :func:`read_content` returns, or from a state dict that is in memory already."""
    tensors = content["model"] if isinstance(content.get("model"), Mapping) else content
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()):
        raise NoStateDictError(f"{source} holds no state dict (names to tensors, at the top or under 'model')")
    odd = [name for name, value in tensors.items() if not is_plain(value)]
    if odd:
        raise NoStateDictError(f"{source} holds tensors that are no plain arrays of real numbers: {_first(odd)}")
    classes = content.get("classes")
    are_told = isinstance(classes, list) and all(map(is_text, classes))
    return Weights(source, tensors, classes if are_told else None, content)


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor holds real numbers as they are: it is not complex, sparse, quantized or without memory."""
    return tensor.layout == torch.strided and not (tensor.is_complex() or tensor.is_quantized or tensor.is_meta)


def is_text(value: Any) -> bool:
    """Whether the value is a text that every file and terminal takes: it is Unicode, and holds no NUL.

    JSON, YAML and pickle can also hold halves of characters (lone surrogates), which nothing can write out again.
    """
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold a NaN or an infinity."""
    real = {name: value for name, value in tensors.items() if value.is_floating_point()}
    if not real:
        return []
    finite = torch.stack([value.isfinite().all() for value in real.values()])  # one wait for a GPU, not one a tensor
    return [name for name, good in zip(real, finite.tolist()) if not good]


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that hold a NaN or an infinity.

    Raises:
        NonFiniteWeightsError: the message begins with the `source`.
    """
    names = not_finite(tensors)
    if names:
        raise NonFiniteWeightsError(
            f"{source}: {len(names)} of {len(tensors)} tensors hold NaN or infinity: {_first(names)}; "
            "the training went wrong before they were saved"
        )


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, shapes and values: two state dicts with the same digest hold the same weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_content(path: str | PathLike[str]) -> dict[str, Any]:
    """The dict that torch.save wrote: a checkpoint or a plain state dict.

    A .safetensors file gives its tensors under ``model`` and, where it tells them, its ``classes``.

    Raises:
        CheckpointError: there is no such file, it is damaged or foreign, or it holds something else.
    """
    try:
        content = _load_safetensors(path) if Path(path).suffix == ".safetensors" else _load_torch(path)
    except FileNotFoundError:
        raise MissingFileError(f"there is no checkpoint at {path}") from None
    except CheckpointError:
        raise
    except Exception as error:  # whatever the readers of zip, pickle and tensors meet in a file that is none of theirs
        raise UnreadableFileError(f"cannot read {path} as a checkpoint: {_reason(error)}") from None
    if not isinstance(content, dict):
        raise NoStateDictError(
            f"{path} holds no state dict: it holds a {type(content).__name__}, expected a dict of tensors"
        )
    return content


def safetensors() -> Any:
    """The package of that name, which is needed for its files alone."""
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise CheckpointError("a .safetensors file needs the package safetensors: pip install safetensors") from None
    return safetensors


def _load_torch(path: str | PathLike[str]) -> Any:
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        raise ValueError("it is empty")
    if start == b"PK\3\4":
        _check_archive(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of some files that are refused in any case
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_archive(path: str | PathLike[str]) -> None:
    """Read every record of the archive against its checksum, and its header for what torch would read differently.

    torch compares no checksum, and believes the headers: of a record that one bit there calls a folder it reads nothing
    and leaves the memory of the tensor as it finds it.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if len({record.filename for record in records}) < len(records):
            raise zipfile.BadZipFile("two of its records have one name")
        for record in records:
            if record.external_attr & DOS_FOLDER and not record.is_dir():
                raise zipfile.BadZipFile(f"the record {record.filename} is marked as a folder")
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise zipfile.BadZipFile(f"the record {record.filename} is marked as compressed")
        # All checksums are zero where the user told torch not to compute them.
        if any(record.CRC for record in records):
            damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"the record {damaged} does not fit its checksum")


def _load_safetensors(path: str | PathLike[str]) -> dict[str, Any]:
    with safetensors().safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it cannot be iterated over)
        metadata = file.metadata() or {}
    if metadata.get("fingerprint") not in (None, fingerprint(tensors)):
        raise ValueError("it is damaged: its tensors are not those that were written")
    return {"model": tensors, "classes": json.loads(metadata.get("classes", "null"))}


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's own message says at length how to run it nevertheless
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        return f"it asks to run {wanted[1]}, which is never done" if wanted else FOREIGN
    if isinstance(error, (zipfile.BadZipFile, NotImplementedError, UnicodeError)):  # zipfile's words for it
        return f"it is damaged or cut short: {error}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # Errors of other types, such as a KeyError, come from reading on blindly and tell a user nothing.
    is_told = isinstance(error, (RuntimeError, ValueError))
    return str(error).strip().partition("\n")[0] if is_told else FOREIGN


# ---- comparing -----------------------------------------------------------------------------------------------------


def compare(model: nn.Module, weights: Weights, *, leave_out: tuple[str, ...] = ()) -> Fit:
    """Compare names and shapes, but for those that begin with one of `leave_out`. The model may be on "meta".

    BatchNorm's counter is not asked for: files that were made with frozen BatchNorm lack it.
    """
    wanted = _without(model.state_dict(), leave_out)
    given = _without(weights.tensors, leave_out)
    missing = [name for name in wanted if name not in given and not name.endswith(COUNTER)]
    shapes = {
        name: f"{tuple(given[name].shape)} for {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in given and given[name].shape != value.shape
    }
    unfilled = {*missing, *shapes}
    numbers = {name: value.numel() for name, value in wanted.items()}
    filled = sum(number for name, number in numbers.items() if name not in unfilled)
    return Fit(
        source=weights.source,
        total=len(wanted),
        matched=len(wanted) - len(unfilled),
        parameters=filled / max(1, sum(numbers.values())),
        missing=missing,
        unexpected=[name for name in given if name not in wanted and not name.endswith(COUNTER)],
        of_another_shape=shapes,
    )


def fill(model: nn.Module, weights: Weights, *, leave_out: tuple[str, ...] = (), called: str = "weights") -> None:
    """Every tensor of the model from `weights` and none left over, but for those under `leave_out`.

    Raises:
        MisfitError: they do not fit; the message begins with what the weights are `called`. The model is as it was.
    """
    fit = compare(model, weights, leave_out=leave_out)
    if not fit.is_complete:
        raise MisfitError(
            f"{called} from {fit.source} do not fit {type(model).__name__}: {fit.matched} of {fit.total} keys matched "
            f"({fit.matched / max(1, fit.total):.0%}); {fit.describe()}",
            fit,
        )
    model.load_state_dict(_without(weights.tensors, leave_out), strict=False)


def _without(tensors: Mapping[str, Tensor], leave_out: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.startswith(leave_out)}


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
