from __future__ import annotations

import os
import random

import numpy
import pytest
import torch

from tardkd.train import checkpoint
from tardkd.train.checkpoint import CheckpointError


def test_round_trip_of_tensors_and_plain_values(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"model": {"w": torch.arange(3.0)}, "epoch": 3, "classes": ["a"], "metrics": {"AP": None}})
    state = checkpoint.load(path)
    assert torch.equal(state["model"]["w"], torch.arange(3.0))
    assert (state["epoch"], state["classes"], state["metrics"]) == (3, ["a"], {"AP": None})
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # whoever may read the user's files may read it


@pytest.mark.parametrize("step", ["torch.save", "os.fsync", "os.replace"])
def test_a_failure_while_writing_leaves_the_previous_checkpoint(tmp_path, monkeypatch, step):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"epoch": 1})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"epoch": 2})
    monkeypatch.undo()
    assert checkpoint.load(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_the_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, original=original: calls.append(name) or original(*args))
    checkpoint.save(tmp_path / "last.pt", {})
    assert calls == ["fsync", "replace", "fsync"]  # the file, the rename, the folder


def truncated(path):
    checkpoint.save(path, {"model": {"w": torch.zeros(1000)}})
    path.write_bytes(path.read_bytes()[:2000])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(("write", "message"), [
    (lambda path: None, "there is no checkpoint at"),
    (truncated, "cannot read .* as a checkpoint"),
    (lambda path: path.write_bytes(b""), "cannot read .* as a checkpoint"),
    (lambda path: path.write_text("hello"), "cannot read .* as a checkpoint"),
    (lambda path: torch.save(torch.zeros(3), path), "holds a Tensor, expected a dict"),
    (lambda path: torch.save({"w": torch.zeros(3)}, path), "of this version of tardkd: its format is None"),
    (lambda path: torch.save({"format": "tardkd checkpoint 0"}, path), "its format is 'tardkd checkpoint 0', expected"),
    (lambda path: torch.save({"format": checkpoint.FORMAT, "model": Evil()}, path), "cannot read .* as a checkpoint"),
])
def test_foreign_files_are_refused_by_name_and_never_executed(tmp_path, monkeypatch, write, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    write(path)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(path)
    assert "last.pt" in str(error.value)
    assert not (tmp_path / "evil").exists()
