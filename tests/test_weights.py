"""Files of weights: what is read from them, and what is said where they do not fit."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tardkd import weights
from tardkd.weights import CheckpointError


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_a_file_gives_its_tensors_classes_and_everything_else(tmp_path):
    state = model().state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"model": state, "classes": ["a", "b"], "step": 3}, tmp_path / "checkpoint.pt")
    plain, checkpoint = weights.read(tmp_path / "plain.pt"), weights.read(tmp_path / "checkpoint.pt")
    for found in (plain, checkpoint):
        torch.testing.assert_close(dict(found.tensors), dict(state), rtol=0, atol=0)
    assert plain.classes is None and checkpoint.classes == ["a", "b"] and checkpoint.content["step"] == 3
    assert checkpoint.source == str(tmp_path / "checkpoint.pt")


def test_classes_that_are_no_list_of_names_are_none():
    assert weights.from_content({"model": {}, "classes": [1, 2]}, "x").classes is None


def test_a_safetensors_file(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    notes = {"classes": json.dumps(["a"])}
    library.save_file(model().state_dict(), tmp_path / "told.safetensors", metadata=notes)
    library.save_file({"w": torch.ones(2)}, tmp_path / "untold.safetensors")
    told, untold = weights.read(tmp_path / "told.safetensors"), weights.read(tmp_path / "untold.safetensors")
    weights.fill(model(), told)
    assert told.classes == ["a"] and untold.classes is None and torch.equal(untold.tensors["w"], torch.ones(2))


@pytest.mark.parametrize(
    "content, kind, message",
    [
        (None, FileNotFoundError, "there is no checkpoint at"),
        (b"hello", pickle.UnpicklingError, "cannot read .* as a checkpoint: it is no file that torch.save wrote"),
        ([1, 2], ValueError, "holds no state dict: it holds a list, expected a dict"),
        ({"note": "text"}, ValueError, "holds no state dict"),
    ],
    ids=["absent", "foreign", "list", "text"],
)
def test_what_cannot_be_read_is_an_error_of_ours_and_of_its_usual_type(tmp_path, content, kind, message):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as error:
        weights.read(path)
    assert isinstance(error.value, kind) and str(path) in str(error.value)


def test_the_comparison_counts_tensors_and_numbers():
    state = model().state_dict()
    state["extra"] = state.pop("1.bias")
    state["0.weight"] = torch.zeros(2, 2)
    with torch.device("meta"):
        fit = weights.compare(model(), weights.from_content(state, "file"))
    assert (fit.missing, fit.unexpected) == (["1.bias"], ["extra"])
    assert fit.of_another_shape == {"0.weight": "(2, 2) for (3, 2)"}
    assert (fit.matched, fit.total) == (5, 7) and fit.parameters == pytest.approx((22 - 3 - 6) / 22)
    assert not fit.is_complete
    expected = "1 missing: 1.bias; 1 unexpected: extra; 1 of another shape: 0.weight (2, 2) for (3, 2)"
    assert fit.describe() == expected
    target = model()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(weights.MisfitError, match=r"from file do not fit Sequential: 5 of 7 keys matched \(71%\)"):
        weights.fill(target, weights.from_content(state, "file"))
    torch.testing.assert_close(dict(target.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("is_given", [False, True])
def test_the_counter_of_batch_norm_is_taken_where_both_have_it(is_given):
    source = model()
    source(torch.rand(4, 2))
    state = source.state_dict()
    if not is_given:
        del state["1.num_batches_tracked"]
    target = model()
    weights.fill(target, weights.from_content(state, "file"))
    assert target[1].num_batches_tracked == int(is_given)
    without = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False))
    kept = {name: value for name, value in source.state_dict().items() if "running" not in name}
    weights.fill(without, weights.from_content(kept, "file"))  # it has no counter, the file may
    assert torch.equal(without[0].weight, source[0].weight)


def test_what_is_left_out_stays_as_it_was():
    source, target = model(), model()
    before = target[1].weight.clone()
    state = {**source.state_dict(), "1.weight": torch.full((5,), 2.0)}
    weights.fill(target, weights.from_content(state, "file"), leave_out=("1.",))
    assert torch.equal(target[0].weight, source[0].weight) and torch.equal(target[1].weight, before)


def opened(monkeypatch) -> list[str]:
    """The names of the files that torch reads from now on."""
    names: list[str] = []
    load = torch.load

    def note(path, *args, **kwargs):
        names.append(Path(path).name)
        return load(path, *args, **kwargs)

    monkeypatch.setattr(torch, "load", note)
    return names


@pytest.mark.parametrize("task", ["train", "resume", "inspect", "doctor"])
def test_a_teachers_file_is_read_once(tmp_path, monkeypatch, task):
    import yaml
    from rich.console import Console
    from train.recipe import teacher_file, tree

    from tardkd.data.scenes import CLASSES
    from tardkd.doctor import examine
    from tardkd.seeing.inspect import inspect_run
    from tardkd.train.config import parse_config
    from tardkd.train.loop import train

    classes = list(CLASSES)
    paths = [teacher_file(tmp_path / "a.pt", classes[:2]), teacher_file(tmp_path / "b.pt", classes[2:])]
    settings = {**tree(tmp_path / "out"), "teacher": [{"weights": path} for path in paths]}
    quick = ("data.train=2", "data.val=1", "train.epochs=1")
    config = parse_config(settings, quick, source="recipe")
    if task in ("resume", "inspect"):
        train(config)
    names = opened(monkeypatch)
    if task == "doctor":
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
        examine(str(tmp_path / "recipe.yaml"), quick, images=1, console=Console(quiet=True))
    elif task == "inspect":
        inspect_run(tmp_path / "out" / "last.pt", tmp_path / "pictures", count=1)
    else:
        train(config, resume=task == "resume")
    assert [name for name in names if name in ("a.pt", "b.pt")] == ["a.pt", "b.pt"]


def test_the_students_file_is_read_once(tmp_path, monkeypatch):
    from train.recipe import recipe, teacher_file

    from tardkd.data.scenes import CLASSES
    from tardkd.train.build import build_distiller

    path = teacher_file(tmp_path / "student.pt", list(CLASSES))
    config = recipe(tmp_path, f"student.weights={path}").for_role("baseline")
    names = opened(monkeypatch)
    build_distiller(config, list(CLASSES))
    assert names == ["student.pt"]


def flipped(path: Path, where: int, bit: int) -> Path:
    """A copy of the file with one bit turned over."""
    data = bytearray(path.read_bytes())
    data[where] ^= 1 << bit
    copy = path.with_name("flipped.pt")
    copy.write_bytes(data)
    return copy


def headers(path: Path) -> dict[str, range]:
    """Where the headers of the records are in the archive's directory."""
    with zipfile.ZipFile(path) as archive:
        start, places = archive.start_dir, {}
        for record in archive.infolist():
            length = 46 + len(record.filename.encode()) + len(record.extra)
            places[record.filename] = range(start, start + length)
            start += length
    return places


def test_a_record_that_one_bit_calls_a_folder_is_damaged(tmp_path):
    """torch reads nothing of such a record, and leaves the memory of its tensor as it finds it."""
    torch.save({"model": model().state_dict()}, tmp_path / "file.pt")
    for name, header in headers(tmp_path / "file.pt").items():
        with pytest.raises(CheckpointError, match=f"flipped.pt as a checkpoint: .* {name} is marked as a folder"):
            weights.read(flipped(tmp_path / "file.pt", header.start + 38, 4))


def test_no_bit_of_a_header_gives_other_weights(tmp_path):
    state = model().state_dict()
    torch.save(state, tmp_path / "file.pt")
    header = next(place for name, place in headers(tmp_path / "file.pt").items() if name.endswith("data/0"))
    for where in header:
        for bit in range(8):
            path = flipped(tmp_path / "file.pt", where, bit)
            try:
                found = weights.read(path).tensors
            except CheckpointError as error:
                assert str(path) in str(error)
            else:
                torch.testing.assert_close(dict(found), dict(state), rtol=0, atol=0)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse(), torch.ones(2, device="meta")],
    ids=["complex", "sparse", "meta"],
)
def test_tensors_that_no_model_takes_are_named(tensor):
    with pytest.raises(CheckpointError, match="file holds tensors that are no plain arrays of real numbers: w"):
        weights.from_content({"model": {"w": tensor}}, "file")
    with pytest.raises(CheckpointError, match="file holds no state dict"):
        weights.from_content({1: torch.ones(2)}, "file")


def test_a_damaged_safetensors_file(tmp_path):
    """The format has no checksums: tardkd's own files carry a fingerprint."""
    library = pytest.importorskip("safetensors.torch")
    state = model().state_dict()
    notes = {"fingerprint": weights.fingerprint(state)}
    library.save_file(state, tmp_path / "a.safetensors", metadata=notes)
    assert weights.read(tmp_path / "a.safetensors").tensors.keys() == state.keys()
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a.safetensors as a checkpoint: it is damaged"):
        weights.read(tmp_path / "a.safetensors")
