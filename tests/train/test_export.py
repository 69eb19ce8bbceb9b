from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torchvision.ops import MultiScaleRoIAlign

from tardkd import cli
from tardkd.detectors import for_model
from tardkd.train import checkpoint, export
from tardkd.train.build import load_student
from tardkd.train.export import ExportError
from tardkd.train.models import build_model

from .recipe import recipe
from .test_checkpoint import files_no_larger_than

CLASSES = ["target", "ball", "board", "parcel", "sign", "star"]
MOBILE = "student={name: fasterrcnn_mobilenet_v3_large_320_fpn, min_size: 128, max_size: 200}"


def write_checkpoint(folder, *overrides):
    """What a training leaves, but for the training."""
    config = recipe(folder, *overrides)
    torch.manual_seed(0)
    model = build_model(config.student, len(CLASSES))
    for module in model.modules():  # as of a trained one: features that vary, and scores without ties
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.backbone(torch.randn(2, 3, 128, 128))
    for name, value in model.named_parameters():
        if "rpn.head.cls_logits" in name or "cls_score" in name:
            value.data *= 20
    checkpoint.save(folder / "last.pt", {"model": model.state_dict(), "classes": CLASSES, "config": config.plain()})
    return folder


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("light"), "student.min_size=96", "student.max_size=128")


@pytest.fixture(scope="module")
def mobile(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("mobile"), MOBILE)


def run(folder, out, *options):
    return cli.main(["export", str(folder), "--out", str(out), *options])


def detections(folder):
    """Of the student on an image of noise."""
    state = checkpoint.load(folder / "last.pt")
    image = torch.rand(3, 100, 130, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return image, load_student(state, folder).eval()([image])[0]


WITHOUT_TARDKD = """
import sys, torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
constructor, *files = sys.argv[1:]
image, found = torch.load("image.pt"), {}
for file in files:
    if file.endswith(".ts"):
        detect = torch.jit.load(file)
        with torch.jit.optimized_execution(False):
            found[file] = detect([image])[1][0]
        continue
    if file.endswith(".safetensors"):
        from safetensors.torch import load_file as load
    else:
        from torch import load
    model = eval(constructor).eval()
    model.load_state_dict(load(file), strict=True)
    with torch.no_grad():
        found[file] = model([image])[0]
torch.save(found, "found.pt")
assert not any(name.startswith("tardkd") for name in sys.modules)
"""


def test_a_student_runs_where_there_is_only_torchvision(mobile, tmp_path, capsys):
    suffixes = [".ts", ".pth", *([".safetensors"] if find_spec("safetensors") else [])]
    files = [str(tmp_path / "out" / f"student{suffix}") for suffix in suffixes]
    for file in files:
        assert run(mobile, file) == 0
    told = capsys.readouterr().out
    assert "6 classes (target, ball, board, parcel, sign, star)" in told
    constructor = told.splitlines()[1].partition(" tensors for ")[2]
    (tmp_path / "script.py").write_text(WITHOUT_TARDKD)
    image, expected = detections(mobile)
    torch.save(image, tmp_path / "image.pt")
    subprocess.run([sys.executable, "script.py", constructor, *files], check=True, cwd=tmp_path)
    assert len(expected["boxes"]) > 20
    for found in torch.load(tmp_path / "found.pt").values():
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.path.basename(file) for file in files)


def test_safetensors_tell_what_they_are(light, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    assert run(light, tmp_path / "student.safetensors") == 0
    with safetensors.safe_open(tmp_path / "student.safetensors", framework="pt") as file:
        notes = file.metadata()
    assert json.loads(notes["classes"]) == CLASSES
    assert notes["model"] == "resnet_fpn" and notes["tardkd"]
    spec = recipe(light, f"student={notes['student']}").student
    model = build_model(spec.model_copy(update={"weights": str(tmp_path / "student.safetensors")}), len(CLASSES))
    image, expected = detections(light)
    torch.testing.assert_close(model.eval()([image])[0], expected)


def test_torchscript_of_the_light_family(light, tmp_path):
    assert run(light, tmp_path / "student.ts") == 0
    notes = {"tardkd.json": ""}
    model = torch.jit.load(tmp_path / "student.ts", _extra_files=notes)
    assert json.loads(json.loads(notes["tardkd.json"])["classes"]) == CLASSES
    image, expected = detections(light)
    torch.testing.assert_close(model([image])[1][0], expected)


@pytest.mark.parametrize("size", [[], ["--size", "80", "112"]])
def test_onnx(light, tmp_path, size):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    assert run(light, tmp_path / "student.onnx", *size) == 0
    session = runtime.InferenceSession(tmp_path / "student.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == CLASSES
    (image,) = session.get_inputs()
    assert image.shape == [3, *(map(int, size[1:]) if size else (96, 96))]
    model = load_student(checkpoint.load(light / "last.pt"), light).eval()
    pixels = torch.rand(image.shape)
    with torch.no_grad():
        expected = model([pixels])[0]
    found = session.run(["boxes", "labels", "scores"], {"image": pixels.numpy()})
    assert len(expected["scores"]) > 2
    torch.testing.assert_close(torch.from_numpy(found[2]), expected["scores"], rtol=1e-3, atol=1e-4)


def test_a_copy_to_be_converted_pools_with_torchvision(light):
    model = for_model(load_student(checkpoint.load(light / "last.pt"), light)).deployable()
    pool = model.roi_heads.box_roi_pool
    assert type(pool) is MultiScaleRoIAlign
    assert (pool.canonical_scale, pool.canonical_level, pool.sampling_ratio) == (56, 4, 2)


def test_a_file_that_detects_something_else_is_not_left(light, tmp_path, monkeypatch, capsys):
    original = torch.jit.load

    def load(file):
        model = original(file)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(1.5)
        return model

    monkeypatch.setattr(torch.jit, "load", load)
    out = tmp_path / "student.ts"
    out.write_text("the one before")
    assert run(light, out, "--overwrite") == 2
    assert "detects something else than the student" in capsys.readouterr().err
    assert out.read_text() == "the one before" and os.listdir(tmp_path) == ["student.ts"]


def test_a_file_that_holds_other_tensors_is_not_left(light, tmp_path, monkeypatch, capsys):
    original = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda content, path: original({**content, "extra": torch.ones(1)}, path))
    assert run(light, tmp_path / "student.pt") == 2
    assert "does not hold the student's tensors" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".ts", ".onnx"])
def test_a_full_disk(light, tmp_path, capsys, suffix):
    for package in {".safetensors": ["safetensors"], ".onnx": ["onnx", "onnxruntime"]}.get(suffix, []):
        pytest.importorskip(package)
    out = tmp_path / f"student{suffix}"
    with files_no_larger_than(10_000):
        assert run(light, out) == 2
    assert f"cannot write {out}: File too large; " in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_an_existing_file_is_kept_unless_told(light, tmp_path, capsys):
    out = tmp_path / "new" / "student.bin"
    assert run(light, out, "--format", "state_dict") == 0
    before = out.stat().st_mtime_ns
    assert run(light, out, "--format", "state_dict") == 2
    assert f"{out} exists; --overwrite replaces it" in capsys.readouterr().err
    assert out.stat().st_mtime_ns == before
    assert run(light, out, "--format", "state_dict", "--overwrite") == 0
    assert out.stat().st_mtime_ns != before
    torch.load(out, weights_only=True)


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "previous.pt", "link.pt", "second.pt"])
def test_no_checkpoint_of_the_run_is_replaced(light, tmp_path, capsys, name):
    last = (light / "last.pt" if light.is_dir() else light).read_bytes()
    for checkpoint_name in ("last.pt", "best.pt", "previous.pt"):
        (tmp_path / checkpoint_name).write_bytes(last)
    (tmp_path / "link.pt").symlink_to(tmp_path / "last.pt")
    os.link(tmp_path / "last.pt", tmp_path / "second.pt")
    assert run(tmp_path / "last.pt", tmp_path / name, "--overwrite") == 2
    assert f"{tmp_path / name} is a checkpoint of the run that it would be exported from" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == last and (tmp_path / "link.pt").is_symlink()


def test_a_device_or_a_pipe_is_not_replaced(light, tmp_path, capsys):
    """A pipe stands for both: a test must not lay hands on the machine's devices."""
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", tmp_path):
        assert run(light, path, "--overwrite", "--format", "state_dict") == 2
        assert f"{path} is a " in capsys.readouterr().err
    assert (tmp_path / "pipe.pt").is_fifo()


def test_weights_that_are_not_finite_are_not_exported(light, tmp_path, capsys):
    state = checkpoint.load(light / "last.pt" if light.is_dir() else light)
    name = next(name for name, value in state["model"].items() if value.is_floating_point())
    state["model"][name].view(-1)[0] = torch.nan
    checkpoint.save(tmp_path / "nan.pt", state)
    for suffix in (".pt", ".ts"):
        assert run(tmp_path / "nan.pt", tmp_path / f"student{suffix}") == 2
        expected = f"{tmp_path / 'nan.pt'}: 1 of {len(state['model'])} tensors hold NaN or infinity: {name}"
        assert expected in capsys.readouterr().err
    assert cli.main(["eval", str(tmp_path / "nan.pt")]) == 2
    assert "hold NaN or infinity" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("student.bin", [], r"does not tell a format \(.pt, .pth, .safetensors, .ts, .onnx\); give --format"),
        ("student.ts", ["--size", "64", "64"], "--size is for onnx, whose input has one size; a torchscript file"),
    ],
)
def test_wrong_requests(light, tmp_path, name, options, message):
    with pytest.raises(ExportError, match=message):
        cli.main(["--traceback", "export", str(light), "--out", str(tmp_path / name), *options])


@pytest.mark.parametrize("suffix, package", [(".safetensors", "safetensors"), (".onnx", "onnx")])
def test_a_missing_package_is_named(light, tmp_path, monkeypatch, capsys, suffix, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert run(light, tmp_path / f"student{suffix}") == 2
    assert f"pip install {package}" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_the_comparison_sees_a_difference():
    one = {
        "boxes": torch.tensor([[1.0, 1, 9, 9], [20, 20, 40, 40]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.5]),
    }
    order = {name: value.flip(0) for name, value in one.items()}
    assert export._differing(one, order, (64, 64)) == 0
    for name in one:
        assert export._differing(one, {**one, name: one[name] + 1}, (64, 64)) == 4, name
    none = {name: value[:0] for name, value in one.items()}
    assert export._differing(one, none, (64, 64)) == export._differing(none, one, (64, 64)) == 2
