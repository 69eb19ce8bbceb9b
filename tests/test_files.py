"""Files are written whole or not at all, and a folder has one writer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tardkd import files
from tardkd.files import FolderInUseError, FolderLock, UnwritableFileError, replacing, write_text


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "file.txt"
    with replacing(path) as first:
        with replacing(path) as second:
            assert first != second and first.exists()
            second.write_text("second")
        first.write_text("first")
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["file.txt"]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    code = (
        "import os, sys; from tardkd.files import replacing\n"
        "with replacing(sys.argv[1]) as file: file.write_text('half'); os.kill(os.getpid(), 9)"
    )
    path = tmp_path / "file.txt"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert len(os.listdir(tmp_path)) == 1 and not path.exists()
    write_text(tmp_path / "other.txt", "of another name")
    assert len(os.listdir(tmp_path)) == 2
    write_text(path, "whole")
    assert sorted(os.listdir(tmp_path)) == ["file.txt", "other.txt"] and path.read_text() == "whole"


def test_an_error_of_the_body_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file.txt"]


def test_nothing_but_a_file_is_replaced(tmp_path):
    """Pipes stand for devices here: a test must not lay hands on those of the machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe):
        with pytest.raises(UnwritableFileError, match=f"cannot write {path}: it is a "), replacing(path) as temporary:
            pytest.fail(f"{temporary} would have replaced it")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "a text goes into it")
    assert os.read(reader, 100) == b"a text goes into it" and pipe.is_fifo()
    os.close(reader)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UnwritableFileError, match="cannot write .*none/file.txt: No such file or directory"):
        write_text(tmp_path / "none" / "file.txt", "")


TAKE = (
    "import os, pathlib, sys, time; from tardkd.files import FolderLock\n"
    "lock = FolderLock(pathlib.Path(sys.argv[1]))\n"
    "lock.take()\n"
)


def take_elsewhere(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", TAKE, str(folder)], capture_output=True, text=True)


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    with FolderLock(tmp_path) as lock:
        lock.take()
        error = take_elsewhere(tmp_path).stderr
        assert f"FolderInUseError: process {os.getpid()} on " in error and f" writes into {tmp_path}; wait" in error
        with pytest.raises(FolderInUseError, match="this process writes into"), FolderLock(tmp_path / ".") as second:
            second.take()
    assert not os.listdir(tmp_path)
    assert take_elsewhere(tmp_path).returncode == 0


def test_a_lock_goes_with_its_process(tmp_path):
    """However it ended: the file is left, but nobody holds it."""
    code = TAKE + "os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -9
    assert os.listdir(tmp_path) == [files.LOCK]
    with FolderLock(tmp_path) as lock:
        lock.take()
    assert not os.listdir(tmp_path)


def test_processes_that_load_images_do_not_keep_the_lock(tmp_path):
    """They are forked from the one that trains, and outlive it for some seconds when it is killed."""
    code = TAKE + "if os.fork() == 0: os.close(1), os.close(2), time.sleep(5)\nos.kill(os.getpid(), 9)"
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert process.returncode == -9
    assert take_elsewhere(tmp_path).returncode == 0
