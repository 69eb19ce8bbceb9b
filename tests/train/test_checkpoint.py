from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
import stat
import zipfile
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tardkd import weights
from tardkd.train import checkpoint, loop
from tardkd.train.checkpoint import CheckpointError
from tardkd.train.loop import train

from .recipe import recipe


def test_round_trip_of_tensors_and_plain_values(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"model": {"w": torch.arange(3.0)}, "epoch": 3, "classes": ["a"], "metrics": {"AP": None}})
    state = checkpoint.load(path)
    assert torch.equal(state["model"]["w"], torch.arange(3.0))
    assert (state["epoch"], state["classes"], state["metrics"]) == (3, ["a"], {"AP": None})
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # whoever may read the user's files may read it


def test_the_checkpoint_before_is_kept_without_a_copy(tmp_path):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    checkpoint.save(last, {"step": 1}, previous=previous)
    assert not previous.exists()
    first = last.stat().st_ino
    checkpoint.save(last, {"step": 2}, previous=previous)
    assert previous.stat().st_ino == first
    checkpoint.save(last, {"step": 3}, previous=previous)
    assert [checkpoint.load(path)["step"] for path in (last, previous)] == [3, 2]
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "previous.pt"]


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS], ids=["exFAT", "FUSE"])
def test_the_checkpoint_before_is_kept_where_files_have_one_name_only(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "last.pt", {"step": step}, previous=tmp_path / "previous.pt")
    assert [checkpoint.load(tmp_path / name)["step"] for name in ("last.pt", "previous.pt")] == [3, 2]


def folders_fail(monkeypatch, code):
    """Folders cannot be synced, files can."""
    original = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_file_system_that_syncs_no_folders(tmp_path, monkeypatch):
    folders_fail(monkeypatch, errno.EINVAL)
    for step in (1, 2):
        checkpoint.save(tmp_path / "last.pt", {"step": step})
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 2


def test_nothing_is_said_to_be_untouched_that_was_replaced(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "last.pt", {"step": 1})
    folders_fail(monkeypatch, errno.EIO)
    with pytest.raises(CheckpointError, match="Input/output error") as error:
        checkpoint.save(tmp_path / "last.pt", {"step": 2})
    assert "untouched" not in str(error.value) and checkpoint.load(tmp_path / "last.pt")["step"] == 2


def test_a_crash_between_the_two_names_leaves_no_third(tmp_path):
    """`previous` and `path` are one file then, and a rename between names of one file does nothing."""
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    checkpoint.save(last, {"step": 1})
    os.link(last, previous)
    checkpoint.save(last, {"step": 2}, previous=previous)
    assert [checkpoint.load(path)["step"] for path in (last, previous)] == [2, 1]
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "previous.pt"]


def test_a_fingerprint_is_of_names_shapes_and_values():
    one = {"a": torch.arange(6.0), "b": torch.tensor(3), "c": torch.zeros(2, dtype=torch.bfloat16)}
    same = {key: one[key].clone() for key in ("c", "a", "b")}
    assert checkpoint.fingerprint(one) == checkpoint.fingerprint(same)
    others = ({"a": one["a"] + 1e-6}, {"a": one["a"].reshape(2, 3)}, {"b": torch.tensor(3, dtype=torch.int32)})
    assert len({checkpoint.fingerprint({**one, **other}) for other in ({}, *others)}) == 4


def test_the_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "link", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, original=original: calls.append(name) or original(*args))
    checkpoint.save(tmp_path / "last.pt", {})
    assert calls == ["fsync", "replace", "fsync"]  # the file, the rename, the folder
    calls.clear()
    checkpoint.save(tmp_path / "last.pt", {}, previous=tmp_path / "previous.pt")
    assert calls == ["fsync", "link", "replace", "replace", "fsync"]  # the second name takes the place of `previous`


# ---- a full disk ---------------------------------------------------------------------------------------------------

FULL = r"cannot write .*last\.pt: .*; \d+ MiB are free in .*; what it held before is untouched"


@pytest.mark.parametrize("step", ["torch.save", "os.fsync", "os.link", "os.replace"])
def test_a_failure_while_writing_leaves_what_was_there(tmp_path, monkeypatch, step):
    path, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    checkpoint.save(path, {"step": 1})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(CheckpointError, match=FULL) as error:
        checkpoint.save(path, {"step": 2}, previous=previous)
    assert "No space left on device" in str(error.value)
    monkeypatch.undo()
    assert checkpoint.load(path)["step"] == 1
    assert set(os.listdir(tmp_path)) <= {"last.pt", "previous.pt"}


class SmallDisk(io.FileIO):
    """A file on a disk with room for so many bytes more."""

    room = 0

    def write(self, data):
        type(self).room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("room", [0, 100, 1500, 4000, 8000])
def test_a_disk_that_is_full_midway(tmp_path, monkeypatch, room):
    path, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    model = {"w": torch.zeros(500), "v": torch.zeros(1500)}
    for step in (1, 2):
        checkpoint.save(path, {"step": step, "model": model}, previous=previous)
    SmallDisk.room = room
    monkeypatch.setattr(checkpoint, "open", SmallDisk, raising=False)
    with pytest.raises(CheckpointError, match=FULL) as error:
        checkpoint.save(path, {"step": 3, "model": model}, previous=previous)
    assert "No space left on device" in str(error.value)
    monkeypatch.undo()
    assert [checkpoint.load(file)["step"] for file in (path, previous)] == [2, 1]
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "previous.pt"]


@contextmanager
def files_no_larger_than(size):
    """The operating system itself ends a write there."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10, 1000, 300_000])
def test_a_write_that_the_system_ends(tmp_path, size):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})
    with files_no_larger_than(size), pytest.raises(CheckpointError, match=FULL) as error:
        checkpoint.save(path, {"model": {name: torch.zeros(50_000) for name in "abc"}})
    assert "File too large" in str(error.value)
    assert checkpoint.load(path)["step"] == 1 and os.listdir(tmp_path) == ["last.pt"]


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(runs, tmp_path, monkeypatch):
    config = recipe(tmp_path, "train.save_every=1").for_role("baseline")
    folder, original = tmp_path / "baseline", loop.checkpoint.save

    def save(path, state, **options):
        with files_no_larger_than(20_000) if state["step"] == 4 else nullcontext():
            original(path, state, **options)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=FULL):
        patch.setattr(checkpoint, "save", save)
        train(config)
    assert [checkpoint.load(folder / name)["step"] for name in ("last.pt", "previous.pt")] == [3, 3]  # and evaluated
    assert not list(folder.glob("*.tmp"))
    train(config, resume=True)
    assert_same(folder, runs / "baseline")


# ---- damaged and foreign files -------------------------------------------------------------------------------------


def small(path):
    """A checkpoint with one of everything, and what it holds."""
    model = {"w": torch.arange(40.0), "n": torch.tensor(3)}
    state = {"model": model, "classes": ["a"], "metrics": {"AP": None}, "step": 7}
    checkpoint.save(path, state)
    return state


def refused_or_whole(path, expected):
    """Damage must not go unnoticed; that of a byte which means nothing may."""
    try:
        state = checkpoint.load(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return "refused"
    torch.testing.assert_close(state.pop("model"), expected["model"], rtol=0, atol=0)
    assert state == {"format": checkpoint.FORMAT, **{key: expected[key] for key in expected if key != "model"}}
    return "whole"


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "last.pt"
    small(path)
    content = path.read_bytes()
    for length in (*range(0, len(content), 29), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cannot read .*last\.pt as a checkpoint: \w+"):
            checkpoint.load(path)


def test_flipped_bits_are_noticed(tmp_path):
    path = tmp_path / "last.pt"
    expected = small(path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        (weights,) = (item for item in archive.infolist() if item.file_size == 160)
    start = content.index(expected["model"]["w"].numpy().tobytes())
    outcomes = []
    for position in (*range(start, start + weights.file_size, 3), *range(0, len(content), 23)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        outcomes.append(refused_or_whole(path, expected))
    assert outcomes[:54] == ["refused"] * 54  # every one in a weight


def change(data, content):
    """What disks, networks and people do to a file."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        where, length = data.draw(st.integers(0, len(content))), data.draw(st.sampled_from([1, 4, 64, 512]))
        kind = data.draw(st.sampled_from(["zero", "random", "cut", "repeat", "swap"]))
        piece = content[where : where + length]
        content[where : where + length] = {
            "zero": bytes(len(piece)),
            "random": data.draw(st.binary(max_size=8)),
            "cut": b"",
            "repeat": piece * 2,
            "swap": piece[::-1],
        }[kind]
    return bytes(content)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "last.pt"
    return path, small(path), path.read_bytes()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_changed_files_are_refused_or_whole(sample, data):
    path, expected, content = sample
    path.write_bytes(change(data, content))
    refused_or_whole(path, expected)


def with_pickle(content, pickled):
    """The archive with other bytes for the pickle, and checksums that fit."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(buffer, "w") as after:
        for item in before.infolist():
            after.writestr(item.filename, pickled if item.filename.endswith("data.pkl") else before.read(item))
    return buffer.getvalue()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_changed_pickles_are_refused_or_read(sample, data):
    path, _, content = sample
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    path.write_bytes(with_pickle(content, change(data, pickled)))
    try:
        assert isinstance(checkpoint.load(path), dict)
    except CheckpointError as error:
        assert str(path) in str(error)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(content=st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: LEGACY[: len(tail)] + tail))
def test_random_bytes_are_refused(sample, content):
    path = sample[0]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="last.pt"):
        checkpoint.load(path)


def written_by(save, content):
    buffer = io.BytesIO()
    save(content, buffer)
    return buffer.getvalue()


def old_save(content, file):
    torch.save(content, file, _use_new_zipfile_serialization=False)


LEGACY = written_by(old_save, {"w": torch.zeros(2)})


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


EVIL = {"format": checkpoint.FORMAT, "model": Evil()}
DAMAGED = "cannot read .* as a checkpoint: "


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "there is no checkpoint at"),
        (b"", DAMAGED + "it is empty"),
        (b"hello", DAMAGED + "it is no file that torch.save wrote"),
        (b"PK\3\4" + bytes(100), DAMAGED + "it is damaged"),
        (pickle.dumps({"a": 1}), DAMAGED),
        (written_by(torch.save, torch.zeros(3)), "holds a Tensor, expected a dict"),
        (written_by(torch.save, {"w": torch.zeros(3)}), "of this version of tardkd: its format is None"),
        (LEGACY, "of this version of tardkd: its format is None"),
        (written_by(torch.save, {"format": "tardkd checkpoint 0"}), "its format is 'tardkd checkpoint 0', expected"),
        (written_by(torch.save, EVIL), DAMAGED + r"it asks to run \w+\.mkdir, which is never done"),
        (written_by(old_save, EVIL), DAMAGED + r"it asks to run \w+\.mkdir, which is never done"),
        (pickle.dumps(EVIL), DAMAGED),
        (written_by(lambda content, file: torch.jit.save(torch.jit.script(content), file), torch.nn.ReLU()), DAMAGED),
    ],
    ids=[
        "absent",
        "empty",
        "text",
        "zip",
        "pickle",
        "tensor",
        "state dict",
        "legacy",
        "version",
        "evil",
        "evil legacy",
        "evil pickle",
        "torchscript",
    ],
)
def test_foreign_files_are_refused_by_name_and_never_executed(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(path)
    assert "last.pt" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "evil").exists()


def test_a_state_dict_without_checksums_is_taken(tmp_path):
    """torch can be told not to compute them, and older versions wrote another format."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(2)}, tmp_path / "plain.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    (tmp_path / "old.pt").write_bytes(LEGACY)
    assert torch.equal(weights.read(tmp_path / "plain.pt").tensors["w"], torch.ones(2))
    assert torch.equal(weights.read(tmp_path / "old.pt").tensors["w"], torch.zeros(2))


def test_a_damaged_last_checkpoint_names_the_one_before(runs, tmp_path, monkeypatch):
    """The whole story: a run, a disk that goes bad, the message, and what it says to do."""
    config = recipe(tmp_path, "train.save_every=2").for_role("baseline")
    folder = tmp_path / "baseline"
    train(config)
    last, previous = folder / "last.pt", folder / "previous.pt"
    content = bytearray(last.read_bytes())
    with zipfile.ZipFile(last) as archive:
        largest = archive.read(max(archive.infolist(), key=lambda record: record.file_size))
    content[content.index(largest) + len(largest) // 2] ^= 1  # between the records a bit may turn without harm
    last.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        train(config, resume=True)
    message, advice = str(error.value).split("; ")
    assert message.startswith(f"cannot read {last} as a checkpoint: ")
    assert advice == f"{previous} of step 6 is whole, to go on from there: cp {previous} {last}"
    shutil.copy(previous, last)
    train(config, resume=True)
    assert_same(folder, runs / "baseline")

    last.unlink()
    previous.write_bytes(b"")
    best = folder / "best.pt"
    with pytest.raises(CheckpointError, match=rf"there is no checkpoint at {last}; {best} of step \d is whole"):
        train(config, resume=True)
    best.unlink()
    with pytest.raises(CheckpointError, match=rf"^there is no checkpoint at {last}$"):
        train(config, resume=True)


def assert_same(left, right):
    one, two = (checkpoint.load(folder / "last.pt")["model"] for folder in (left, right))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
