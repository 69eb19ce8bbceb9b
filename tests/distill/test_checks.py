"""Every way to fail without a word is an error that says which."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from detectors.tiny import tiny_batch, tiny_detector
from torch import nn

from tardkd.distill import Distiller, DistillSettings, ScheduleSettings, load_teacher_weights


def step(student: nn.Module, teacher: nn.Module, **settings: Any) -> dict[str, torch.Tensor]:
    return Distiller(student, teacher, DistillSettings(**settings))(*tiny_batch())


# --- teacher weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [False, True])
def test_weights_load(wrap: bool, tmp_path: Path) -> None:
    source, model = tiny_detector(seed=1), tiny_detector(seed=2)
    state: Any = {"model": source.state_dict(), "epoch": 3} if wrap else source.state_dict()
    torch.save(state, tmp_path / "teacher.pt")
    load_teacher_weights(model, tmp_path / "teacher.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters()))
    load_teacher_weights(tiny_detector(seed=3), state)


def test_weights_that_do_not_fit() -> None:
    model = tiny_detector()
    before = copy.deepcopy(model.state_dict())
    state = tiny_detector(num_classes=6, seed=1).state_dict()
    state["extra"] = state.pop("rpn.head.cls_logits.bias")
    with pytest.raises(ValueError, match="keys matched") as error:
        load_teacher_weights(model, state)
    total = len(before)
    for part in (
        f"{total - 5} of {total} keys matched ({(total - 5) / total:.0%})",
        "1 missing: rpn.head.cls_logits.bias;",
        "1 unexpected: extra;",
        "4 of another shape: roi_heads.box_predictor.cls_score.weight (6, 16) for (4, 16),",
    ):
        assert part in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_of_something_else() -> None:
    message = r"0 of \d+ keys matched \(0%\); \d+ missing: .*, \.\.\.; 2 unexpected: weight, bias"
    with pytest.raises(ValueError, match=message):
        load_teacher_weights(tiny_detector(), nn.Linear(2, 2).state_dict())


def test_weights_that_are_none(tmp_path: Path) -> None:
    torch.save([1, 2, 3], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt holds no state dict"):
        load_teacher_weights(tiny_detector(), tmp_path / "list.pt")


def test_weights_run_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_teacher_weights(tiny_detector(), tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


# --- models that do not pair -------------------------------------------------------------------------------


def test_teacher_is_the_student() -> None:
    model = tiny_detector()
    with pytest.raises(ValueError, match=r"share \d+ parameters \(backbone\.body\.0\.weight, "):
        Distiller(model, model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_shared_backbone() -> None:
    student, teacher = tiny_detector(), tiny_detector(seed=1)
    teacher.backbone = student.backbone
    with pytest.raises(ValueError, match="student and teacher share"):
        Distiller(student, teacher)


def test_unknown_model() -> None:
    with pytest.raises(TypeError, match="no adapter for a detector of type torch.nn.*Linear"):
        Distiller(tiny_detector(), nn.Linear(2, 2))


def test_numbers_of_classes_differ() -> None:
    with pytest.raises(ValueError, match=r"student's head has 4 logits .*teacher's has 6"):
        Distiller(tiny_detector(), tiny_detector(num_classes=6))


class Opaque(nn.Module):
    """A predictor whose widths only a pass can tell."""

    def __init__(self, logits: int, deltas: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, logits), nn.Linear(16, deltas)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), self.b(x)


@pytest.mark.parametrize(
    "widths, message",
    [
        ((6, 24), "student's head has 4 logits .*teacher's has 6"),
        ((4, 4), r"student's deltas are class-specific \(16 columns\).*teacher's are class-agnostic"),
    ],
)
def test_widths_that_only_a_pass_can_tell(widths: tuple[int, int], message: str) -> None:
    teacher = tiny_detector(seed=1)
    teacher.roi_heads.box_predictor = Opaque(*widths)
    with pytest.raises(ValueError, match=message):
        step(tiny_detector(), teacher)


def test_class_agnostic_teacher() -> None:
    teacher = tiny_detector(seed=1)
    teacher.roi_heads.box_predictor.bbox_pred = nn.Linear(16, 4)
    with pytest.raises(ValueError, match="teacher's are class-agnostic"):
        Distiller(tiny_detector(), teacher)


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        (["a", "b", "c"], ["d", "e", "f"], "student: a, b, c; teacher: d, e, f;"),
        (["a", "b", "c"], ["a", "b"], "the teacher's head, with 4 logits and 16 deltas a region, is not one of its 2"),
    ],
)
def test_class_names_that_do_not_fit(student: list[str], teacher: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Distiller(tiny_detector(), tiny_detector(seed=1), student_classes=student, teacher_classes=teacher)


def test_class_names_agree_or_are_unknown() -> None:
    names = ["a", "b", "c"]
    Distiller(tiny_detector(), tiny_detector(seed=1), student_classes=names, teacher_classes=tuple(names))
    Distiller(tiny_detector(), tiny_detector(seed=1), student_classes=names)


@pytest.mark.parametrize("other", [{"output_size": 5}, {"sampling_ratio": 1}])
def test_pooled_path_needs_alike_pooling(other: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"path='pooled' needs .*student: RoIAlignSpec.*teacher: RoIAlignSpec"):
        Distiller(tiny_detector(), tiny_detector(seed=1, **other), DistillSettings(path="pooled"))


def test_gaussian_needs_equal_scales() -> None:
    with pytest.raises(ValueError, match=r"student: \[0.25, 0.125\], teacher: \[0.5, 0.25\]"):
        step(tiny_detector(), tiny_detector(seed=1, first=1), gaussian=1.0)


# --- terms that cannot teach -------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [8, 12], ids=["identity", "adapter"])
@pytest.mark.parametrize("path", ["pooled", "pyramid"])
def test_frozen_backbone(channels: int, path: str) -> None:
    student = tiny_detector()
    student.backbone.requires_grad_(False)
    teacher = tiny_detector(seed=1, channels=channels)
    with pytest.raises(RuntimeError, match="^distill_feature: weight > 0, but no gradient"):
        step(student, teacher, path=path)
    with pytest.raises(RuntimeError, match="^distill_gaussian: weight > 0, but no gradient"):
        step(student, teacher, feature=0.0, gaussian=1.0)
    step(student, teacher, feature=0.0)


def test_frozen_student() -> None:
    student = tiny_detector().requires_grad_(False)
    with pytest.raises(RuntimeError, match="^distill_feature, distill_classification, distill_regression:"):
        step(student, tiny_detector(seed=1))


def test_without_gradients_on_purpose() -> None:
    with torch.no_grad():
        losses = step(tiny_detector(), tiny_detector(seed=1))
    assert not any(value.requires_grad for value in losses.values())


# --- terms that are not numbers ----------------------------------------------------------------------------


def poison(model: nn.Module, layer: str) -> nn.Module:
    with torch.no_grad():
        model.get_submodule(layer).bias[1] = torch.nan
    return model


def test_nan_term() -> None:
    teacher = poison(tiny_detector(seed=1), "backbone.fpn.layer_blocks.1.0")
    with pytest.raises(FloatingPointError, match="distill_feature"):
        step(tiny_detector(), teacher, feature_gate="foreground")
    with pytest.raises(FloatingPointError, match="^NaN or infinity in distill_gaussian$"):
        step(tiny_detector(), teacher, feature=0.0, classification=0.0, regression=0.0, gaussian=1.0)


@pytest.mark.parametrize("layer, name", [("cls_score", "logits"), ("bbox_pred", "deltas")])
def test_nan_that_a_gate_would_hide(layer: str, name: str) -> None:
    teacher = poison(tiny_detector(seed=1), f"roi_heads.box_predictor.{layer}")
    with pytest.raises(FloatingPointError, match=f"the teacher's {name}"):
        step(tiny_detector(), teacher)


def test_finite_check_can_be_switched_off() -> None:
    teacher = poison(tiny_detector(seed=1), "backbone.fpn.layer_blocks.1.0")
    losses = step(tiny_detector(), teacher, feature_gate="foreground", check_finite=False)
    assert losses["distill_feature"].isnan()


# --- the detector itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["loss_objectness", "loss_box_reg"])
def test_a_loss_of_the_detectors_own_that_is_not_finite_is_named(term: str) -> None:
    distiller = Distiller(tiny_detector(), tiny_detector(seed=1))
    broken_loss(distiller.student, term)
    with pytest.raises(FloatingPointError, match=f"^NaN or infinity in {term}$"):
        distiller(*tiny_batch())


def test_it_is_named_also_when_the_distillation_has_ended() -> None:
    distiller = Distiller(tiny_detector(), tiny_detector(seed=1), DistillSettings(schedule=ScheduleSettings(stop=0.5)))
    distiller.start(2, 1)
    distiller.set_progress(1, 0)
    broken_loss(distiller.student, "loss_classifier")
    with pytest.raises(FloatingPointError, match="^NaN or infinity in loss_classifier$"):
        distiller(*tiny_batch())


def broken_loss(student: nn.Module, term: str) -> None:
    """Let the student return NaN as this loss."""

    def with_nan(module: nn.Module, args: Any, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**losses, term: losses[term] * torch.nan}

    student.register_forward_hook(with_nan)


# --- arguments of another kind -----------------------------------------------------------------------------


def build(num_classes: int) -> nn.Module:
    return tiny_detector(num_classes=num_classes)


def test_a_function_is_no_model() -> None:
    with pytest.raises(TypeError, match=r"the student must be a detector \(an nn.Module\), got function"):
        Distiller(build, tiny_detector())
    with pytest.raises(TypeError, match=r"the student must be a detector \(an nn.Module\), got function"):
        Distiller(build, None, enabled=False)
    with pytest.raises(TypeError, match=r"teacher must be a detector \(an nn.Module\).*got function"):
        Distiller(tiny_detector(), build)
    with pytest.raises(TypeError, match=r"teacher must be a detector \(an nn.Module\).*got function"):
        Distiller(tiny_detector(), [build, build])


def test_settings_are_no_dict() -> None:
    with pytest.raises(TypeError, match="settings must be a DistillSettings, got dict"):
        Distiller(tiny_detector(), tiny_detector(seed=1), {"feature": 1.0})
    with pytest.raises(TypeError, match="DistillSettings.schedule must be a ScheduleSettings"):
        DistillSettings(schedule={"kind": "cosine"})
