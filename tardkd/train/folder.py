"""Output folders: claimed before anything is written into them, and never cleared of what is not our own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from tardkd.files import FolderLock, remove_abandoned, write_text
from tardkd.train.config import Config, ConfigError
from tardkd.train.plain_yaml import PlainYamlError, read_yaml

# What a training leaves in its folder.
OUTPUTS = ("last.pt", "previous.pt", "best.pt", "failed*.pt", "train.csv", "eval.csv", "config.yaml", "tensorboard")


def outputs_in(folder: Path, patterns: Iterable[str] = OUTPUTS) -> list[Path]:
    """The files and folders of those names that `folder` holds, in alphabetical order."""
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def claim(
    folder: Path,
    refusal: Callable[[list[str]], str],
    *,
    overwrite: bool,
    patterns: Iterable[str] = OUTPUTS,
    lock: FolderLock | None = None,
) -> None:
    """Make the folder, and refuse it where it holds earlier outputs.

    Args:
        refusal: the message of that error, from the names of those outputs.
        overwrite: remove the outputs, and nothing else, instead of refusing.
        patterns: the names of what counts as an output.
        lock: of that folder, taken before anything in it is looked at.

    Raises:
        ConfigError: the folder is in use, or a file is in its place.
        FolderInUseError: another process writes into it.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {folder} is a file, not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if lock is not None:
        lock.take()
        remove_abandoned(folder)
    used = outputs_in(folder, patterns)
    if used and not overwrite:
        raise ConfigError(refusal([path.name for path in used]))
    for path in used:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def claim_for_run(folder: Path, *, overwrite: bool, lock: FolderLock | None = None) -> None:
    """Claim the folder for one training."""
    claim(
        folder,
        lambda held: (
            f"output folder {folder} is in use (it holds {', '.join(held)}); "
            "--resume continues that run, --overwrite starts again, or choose another output="
        ),
        overwrite=overwrite,
        lock=lock,
    )


def reclaim(folder: Path, lock: FolderLock) -> None:
    """Claim the folder for the training that has begun there, if there is such a folder."""
    if folder.is_dir():
        lock.take()
        remove_abandoned(folder)


def write_config(path: Path, config: Config) -> None:
    """Write all settings of the run, unless the file has just these: somebody may have put comments between them."""
    try:
        if read_yaml(path.read_text(encoding="utf-8")) == config.plain():
            return
    except (OSError, ValueError, PlainYamlError):
        pass  # it is not there, or is none any more
    write_text(path, yaml.safe_dump(config.plain(), sort_keys=False))
