"""A trained student as a file for others to run. What is written is read back and compared before it gets its name.

| format | suffix | what it needs to run | input |
|---|---|---|---|
| state_dict | .pt, .pth | torchvision, and the constructor that ``export`` reports | |
| safetensors | .safetensors | the same; classes and settings are in its metadata | |
| torchscript | .ts | torch, with torchvision imported for its ops; torchvision's detectors | a list of images |
| onnx | .onnx | onnxruntime or another runtime | one image of a fixed size |

Images are (3, H, W) with values in 0..1, as everywhere in torchvision. A state dict holds weights alone: input sizes
and thresholds are arguments of the constructor. The light ``resnet_fpn`` family has no constructor in torchvision: its
state dict needs ``tardkd.train.models.build_model``; its TorchScript and ONNX files do not need tardkd.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tardkd import __version__
from tardkd.data import Scenes
from tardkd.detectors import for_model
from tardkd.train import checkpoint
from tardkd.train.build import load_student, stored_config
from tardkd.train.formats import SUFFIXES
from tardkd.train.models import ModelSpec
from tardkd.weights import check_finite, fingerprint, safetensors

OPSET = 17
OUTPUTS = ("boxes", "labels", "scores")
CHECKPOINTS = (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST)

Detections = dict[str, Tensor]  # OUTPUTS: (n, 4) xyxy in pixels, (n,) from 1, (n,)
Detect = Callable[[Tensor], Detections]  # of one image
DetectAll = Callable[[list[Tensor]], list[Detections]]


class ExportError(RuntimeError):
    """A student that could not be exported as asked; the message says why."""


def export(
    source: str | Path,
    out: str | Path,
    kind: str | None = None,
    *,
    size: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> str:
    """Write the student of the checkpoint `source` to `out` and return what to tell the user about it.

    `kind` is a format of the table above, by default that of the suffix; `size` the (height, width) of ONNX's input, by
    default a square of the student's ``min_size``.

    Raises:
        CheckpointError: `source` cannot be read, or `out` not written.
        ExportError: `out` exists or is no place for a file, a package is missing, or the file does not detect what
            the student does.
    """
    source, out = Path(source), Path(out)
    kind = kind or SUFFIXES.get(out.suffix)
    if kind is None:
        raise ExportError(f"the name {out} does not tell a format ({', '.join(SUFFIXES)}); give --format")
    if size is not None and kind != "onnx":
        raise ExportError(f"--size is for onnx, whose input has one size; a {kind} file takes images of any")
    _check_target(source, out, overwrite=overwrite)
    state = checkpoint.load_trained(source)
    check_finite(state["model"], str(source))
    spec, classes = stored_config(state, source).student, state["classes"]
    out.parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.replacing(out) as file:
        if kind in ("state_dict", "safetensors"):
            tensors = {name: value.contiguous() for name, value in state["model"].items()}
            if kind == "state_dict":
                _write_state_dict(tensors, file)
            else:
                _write_safetensors(tensors, metadata(spec, classes), file)
            notes = f"{len(tensors)} tensors for {constructor(spec, len(classes))}"
        else:
            student = load_student(state, source).eval().requires_grad_(False)
            write = _write_torchscript if kind == "torchscript" else _write_onnx
            detector = for_model(student)
            side = int(detector.input_size)
            detect = write(detector.deployable(), metadata(spec, classes), file, size or (side, side))
            sizes = [size or (side, side)] if kind == "onnx" else [(side, side), (side * 4 // 5, side * 7 // 6)]
            count = sum(check_detections(detector.detect, detect, size) for size in sizes)
            notes = f"its {count} detections in test images are the student's"
    return f"{out}: {kind}, {len(classes)} classes ({', '.join(classes)}), {notes}"


def _check_target(source: Path, out: Path, *, overwrite: bool) -> None:
    """Refuse to write where something would be lost: over a checkpoint of that run, a device, or a file in use."""
    if not out.exists():
        return
    if not out.is_file():
        raise ExportError(f"{out} is a {'folder' if out.is_dir() else 'device or pipe'}, not a file to be replaced")
    checkpoints = (source, *(source.with_name(name) for name in CHECKPOINTS))
    if any(path.exists() and path.samefile(out) for path in checkpoints):
        raise ExportError(
            f"{out} is a checkpoint of the run that it would be exported from; choose another name for --out"
        )
    if not overwrite:
        raise ExportError(f"{out} exists; --overwrite replaces it")


def metadata(spec: ModelSpec, classes: list[str]) -> dict[str, str]:
    """What travels with the weights where a format has room for it; `student` is the recipe's section, as JSON."""
    return {
        "classes": json.dumps(classes),
        "model": spec.title,
        "tardkd": __version__,
        "student": json.dumps(_settings(spec)),
    }


def _settings(spec: ModelSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude_defaults=True, exclude={"weights", "new_head", "backbone_weights"})


def constructor(spec: ModelSpec, num_classes: int) -> str:
    """The Python expression whose module takes the state dict."""
    if spec.model is not None:
        backbone = f", backbone={spec.backbone!r}" if spec.backbone else ""
        return f"{spec.model.replace(':', '.')}({num_classes + 1}{backbone})"
    if spec.is_light:
        return f"tardkd.train.models.build_model(ModelSpec(**{_settings(spec)}), {num_classes})"
    options = "".join(f", {key}={value!r}" for key, value in spec.options.items())
    eps = "" if spec.norm_eps is None else f", with eps = {spec.norm_eps} in every BatchNorm2d"
    if spec.name == "fasterrcnn_resnet101_fpn":
        backbone = "resnet_fpn_backbone(backbone_name='resnet101', weights=None)"
        return f"FasterRCNN({backbone}, {num_classes + 1}{options}){eps}"
    return f"{spec.name}(weights=None, weights_backbone=None, num_classes={num_classes + 1}{options}){eps}"


# ---- formats -------------------------------------------------------------------------------------------------------


def _write_state_dict(tensors: dict[str, Tensor], file: Path) -> None:
    checkpoint.write(tensors, file)
    _check_tensors(torch.load(file, weights_only=True), tensors)


def _write_safetensors(tensors: dict[str, Tensor], notes: dict[str, str], file: Path) -> None:
    library = safetensors()
    notes = {"format": "pt", **notes, "fingerprint": fingerprint(tensors)}  # the format has no checksums of its own
    file.write_bytes(library.torch.save(tensors, metadata=notes))
    _check_tensors(library.torch.load_file(file), tensors)


def _check_tensors(written: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if written.keys() != expected.keys() or not all(torch.equal(written[name], expected[name]) for name in expected):
        raise ExportError("the file does not hold the student's tensors")


def _write_torchscript(model: nn.Module, notes: dict[str, str], file: Path, size: tuple[int, int]) -> Detect:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        try:
            scripted = torch.jit.script(model)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ExportError(
                f"TorchScript cannot be made of this detector; a file .onnx, .pt or .safetensors can ({reason})"
            ) from error
        with open(file, "wb") as opened:
            torch.jit.save(scripted, opened, _extra_files={"tardkd.json": json.dumps(notes)})
        loaded = torch.jit.load(str(file))

    def detect(image: Tensor) -> Detections:
        with torch.jit.optimized_execution(False):  # what compiling takes is not worth two images
            return loaded([image])[1][0]

    return detect


def _write_onnx(model: nn.Module, notes: dict[str, str], file: Path, size: tuple[int, int]) -> Detect:
    try:
        import onnx
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ExportError(f"format onnx needs the package {error.name}: pip install onnx onnxruntime") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer warns of values that are constant here, as the size is one
        # The newer exporter, dynamo=True, cannot follow shapes that depend on what is detected.
        torch.onnx.export(
            _OneImage(model).eval(),
            (picture(model, size),),
            str(file),
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(OUTPUTS),
            dynamic_axes={name: {0: "detections"} for name in OUTPUTS},
        )
    content = onnx.load(str(file))
    onnx.helper.set_model_props(content, notes)
    onnx.checker.check_model(content)
    onnx.save(content, str(file))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def detect(image: Tensor) -> Detections:
        return dict(zip(OUTPUTS, map(torch.from_numpy, session.run(OUTPUTS, {"image": image.numpy()})), strict=True))

    return detect


class _OneImage(nn.Module):
    """A detector as a function of one tensor, which is what ONNX knows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        detections = self.model([image])[0]
        return tuple(detections[name] for name in OUTPUTS)


# ---- comparison ----------------------------------------------------------------------------------------------------


def check_detections(student: DetectAll, detect: Detect, size: tuple[int, int]) -> int:
    """Compare `detect` with the `student` on an image of `size`; the number of detections, or an ExportError."""
    image = picture(student, size)
    rounding = 1e-5 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, written, rounded = student([image])[0], detect(image), student([image + rounding])[0]
    lost = _differing(expected, written, size)
    # Rounding may move what is just at a threshold, or among the last that are kept; more of it in a raw student.
    if lost > 0.02 * (len(expected["boxes"]) + len(written["boxes"])) + 2 * _differing(expected, rounded, size):
        raise ExportError(
            f"what was written detects something else than the student in an image of {size[0]} x "
            f"{size[1]}: of {len(expected['boxes'])} and {len(written['boxes'])} detections {lost} have no "
            "partner of equal label, score and box"
        )
    return len(expected["boxes"])


def picture(detect: DetectAll, size: tuple[int, int]) -> Tensor:
    """The image (3, *size) in which a detector finds most, out of noise and some of the built-in scenes."""
    images = [torch.rand(3, *size, generator=torch.Generator().manual_seed(0))]
    for scene, _ in Scenes(2, 192, 0, split="test"):
        images.append(functional.interpolate(scene[None] / 255, size, mode="bilinear")[0])
    with torch.no_grad():
        return max(images, key=lambda image: len(detect([image])[0]["boxes"]))


def _differing(left: Detections, right: Detections, size: tuple[int, int]) -> int:
    """How many detections of either have none in the other with the same label, score and box."""
    same = left["labels"][:, None] == right["labels"]
    same &= (left["scores"][:, None] - right["scores"]).abs() < 0.01
    same &= (left["boxes"][:, None] - right["boxes"]).abs().amax(-1) < 0.005 * max(size)
    return int((~same.any(1)).sum() + (~same.any(0)).sum())
