"""Writing files: the one way in which anything that must not be lost gets its name, and the lock on a folder.

A file is written under a temporary name beside the one that it is to have, synced and renamed, so that a crash leaves
what was there before whole. The temporary name is the writer's own, so that two writers never share one; one whose
writer has died is removed by the next who writes the same file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

fcntl: Any
try:
    import fcntl
except ModuleNotFoundError:  # Windows has no locks of this kind: there nobody is kept out
    fcntl = None

LOCK = ".lock"  # in a locked folder, while it is locked
TEMPORARY = ".tmp"  # the ending of temporary names
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}  # what file systems without locks answer


class UnwritableFileError(OSError):
    """A file that could not be written; the message names it and the reason."""


class FolderInUseError(RuntimeError):
    """Another process writes into the folder; the message says which."""


# ---- writing -------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path, *, previous: str | Path | None = None) -> Iterator[Path]:
    """A temporary file beside `path` for the body to write; then it is synced and takes the place of `path`.

    What `path` held before is kept as `previous`, where that is given. Whatever goes wrong, `path` is as it was and
    the temporary file is gone.

    Raises:
        UnwritableFileError: the file cannot be written, or `path` is something else than a file, such as a device.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UnwritableFileError(f"cannot write {path}: it is a {'folder' if path.is_dir() else 'device or pipe'}")
    replaced = False
    try:
        with _temporary(path) as temporary:
            yield temporary
            _sync(temporary)
            if previous is not None and path.exists():
                _keep(path, Path(previous))
            os.replace(temporary, path)
            replaced = True
            _sync_folder(path.parent)  # the rename itself must survive a power cut
    except UnwritableFileError:
        raise
    except OSError as error:
        kept = "; what it held before is untouched" if path.exists() and not replaced else ""
        raise UnwritableFileError(
            f"cannot write {path}: {error.strerror or error}; {_free(path.parent)}{kept}"
        ) from None


def write_text(path: str | Path, text: str) -> None:
    """Write the text as UTF-8 so that `path` always holds all of one text; into a pipe or a terminal, write it there.

    Raises:
        UnwritableFileError: it could not be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UnwritableFileError(f"cannot write {path}: {error.strerror}") from None
        return
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path`, locked so that others see that its writer lives, and removed in the end."""
    remove_abandoned(path.parent, f"{path.name}.")
    while True:
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        if _lock_file(descriptor) is not False and temporary.exists():  # else someone took it for abandoned just now
            break
        os.close(descriptor)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def remove_abandoned(folder: Path, prefix: str = "") -> None:
    """Remove the temporary files that begin with `prefix` and whose writers have died."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):  # it is a favour: whoever may not look or remove can write nevertheless
        for name in os.listdir(folder):
            if name.startswith(prefix) and name.endswith(TEMPORARY):
                _remove_if_abandoned(folder / name)


def _remove_if_abandoned(path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        return
    descriptor = os.open(path, os.O_RDWR)
    try:
        if _lock_file(descriptor):
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _lock_file(descriptor: int) -> bool | None:
    """Lock that file as long as it is open; False where somebody else has, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return None if error.errno in NO_LOCKS else False
    return True


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free in {folder}"
    except OSError as error:
        return f"{folder}: {error.strerror}"


def _keep(path: Path, previous: Path) -> None:
    """`path` under a second name, without copying it."""
    second = previous.with_name(f"{previous.name}.{secrets.token_hex(4)}{TEMPORARY}")
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


# ---- the lock ------------------------------------------------------------------------------------------------------

_held: dict[tuple[int, int], int] = {}  # the folders that are locked here, by device and number: in which process


class FolderLock:
    """Keeps others from writing into a folder, from :meth:`take` to the end of the `with` block.

    The lock is the process's own: it goes with the process, however that ends, and processes that it has forked, such
    as those that load images, do not keep it. It is a file in the folder, so that it also holds among the machines of
    a cluster where their file system has locks. Where it has none, nobody is kept out.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None
        self._key: tuple[int, int] | None = None

    def take(self) -> None:
        """Lock the folder, which must be there.

        Raises:
            FolderInUseError: another process has locked it, or this one has.
            UnwritableFileError: no file can be made in it.
        """
        status = os.stat(self._folder)
        key = status.st_dev, status.st_ino
        if _held.get(key) == os.getpid():
            raise FolderInUseError(f"this process writes into {self._folder} already; choose another folder")
        while self._descriptor is None:
            self._descriptor = self._open()
        _held[key] = os.getpid()
        self._key = key

    def _open(self) -> int | None:
        """The lock file, open and locked; None where its owner has removed it at this very moment."""
        path = self._folder / LOCK
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise UnwritableFileError(f"cannot write into {self._folder}: {error.strerror}") from None
        try:
            if fcntl is not None:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                owner = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                raise FolderInUseError(
                    f"{owner or 'another process'} writes into {self._folder}; wait until it has ended, or choose "
                    "another folder"
                ) from None
        try:
            is_there = os.path.samestat(os.fstat(descriptor), os.stat(path))
        except FileNotFoundError:
            is_there = False
        if not is_there:
            os.close(descriptor)
            return None
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return descriptor

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is None or self._key is None:
            return
        del _held[self._key]
        with contextlib.suppress(OSError):  # the folder may be gone
            os.unlink(self._folder / LOCK)
        os.close(self._descriptor)
        self._descriptor = self._key = None
