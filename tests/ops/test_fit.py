"""The look that spares a call the checks: it says yes of what is plain, and never of what the checks would refuse."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch

import tardkd.ops
from tardkd.ops import checks
from tardkd.ops.inputs import RegionInputs

from .scenes import LAYOUTS, make_scene
from .test_pooled_loss import make_pooled

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch does not describe its tensors to C"
)


def fit(scene, features="pyramids", activation="softmax", **changed):
    """Whether the scene is known to fit; ``changed`` fields of RegionInputs."""
    given = RegionInputs(*scene.per_region, scene.region_weights)._replace(**changed)
    if features == "pyramids":
        return checks.fit(given, activation, pyramids=(scene.student_features, scene.teacher_features))
    if features == "pooled":
        dtype = scene.student_logits.dtype
        return checks.fit(given, activation, pooled=make_pooled(scene, dtype, dtype))
    return checks.fit(given, activation)


@pytest.mark.parametrize("features", ["pyramids", "pooled", "heads"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_plain_tensors_fit(dtype, layout, features):
    assert fit(make_scene(1).to(dtype, None, layout), features)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("form", ["agnostic", "specific", "specific+background"])
def test_heads_of_every_form_fit(activation, form):
    scene = make_scene(2, activation=activation, student_deltas=form, teacher_deltas="agnostic")
    assert fit(scene.to(torch.float32), activation=activation)


def test_a_call_that_fits_is_not_checked_again(cpu):
    scene = make_scene(3).to(torch.float32)
    with mock.patch.object(checks, "check_tensor", side_effect=AssertionError):
        tardkd.ops.region_distill_loss(*scene.inputs, **scene.scales)
        tardkd.ops.pooled_distill_loss(*make_pooled(scene, torch.float32, torch.float32), *scene.per_region)
        tardkd.ops.head_distill_loss(*scene.per_region)


CHANGES = {
    "proposals": [lambda t: [t[:, 1:]], lambda t: t[:, 1:], lambda t: t.half(), lambda t: t[1:]],
    "student_logits": [lambda t: t[:, 1:], lambda t: t[1:], lambda t: t.double(), lambda t: t.int(), lambda t: t[0]],
    "teacher_logits": [lambda t: t.detach().requires_grad_(), lambda t: t[:, :-1], lambda t: t.double()],
    "student_deltas": [lambda t: t[:, :6], lambda t: t[:, 0], lambda t: t.double(), lambda t: None],
    "teacher_deltas": [lambda t: t.detach().requires_grad_(), lambda t: t[:, :5]],
    "labels": [lambda t: t.int(), lambda t: t[:, None], lambda t: t[1:], lambda t: t.tolist()],
    "gt_boxes": [lambda t: t[:, :3], lambda t: t.long(), lambda t: t.bfloat16(), lambda t: t.to("meta")],
    "region_weights": [lambda t: t.requires_grad_(), lambda t: t[1:], lambda t: t.long()],
}


@pytest.mark.parametrize("name, change", [(name, change) for name in CHANGES for change in CHANGES[name]])
@pytest.mark.parametrize("features", ["pyramids", "pooled", "heads"])
def test_what_is_not_plain_is_left_to_the_checks(features, name, change):
    scene = make_scene(4).to(torch.float32)
    plain = scene.region_weights if name == "region_weights" else getattr(scene, name)
    assert not fit(scene, features, **{name: change(plain)})


@pytest.mark.parametrize("name", ["student_levels", "teacher_levels", "student_scores", "teacher_scores"])
def test_what_is_given_from_outside_is_left_to_the_checks(name):
    scene = make_scene(5).to(torch.float32)
    assert not fit(scene, **{name: torch.zeros(len(scene.labels))})


@pytest.mark.parametrize("side", ["student_features", "teacher_features"])
@pytest.mark.parametrize(
    "change",
    [
        lambda maps: [],
        lambda maps: None,
        lambda maps: maps[0],
        lambda maps: maps * 3,
        lambda maps: [maps[0], *maps],
        lambda maps: iter(maps),
        lambda maps: [maps[0].double(), *maps[1:]],
        lambda maps: [map_.double() for map_ in maps],
        lambda maps: [maps[0][:1], *maps[1:]],
        lambda maps: [maps[0], maps[1][:, :2], *maps[2:]],
        lambda maps: [map_[:, :2] for map_ in maps],
        lambda maps: [maps[0][:, :, :0], *maps[1:]],
        lambda maps: [maps[0][0], *maps[1:]],
        lambda maps: [maps[0].to_sparse(), *maps[1:]],
        lambda maps: [maps[0].to("meta"), *maps[1:]],
    ],
)
def test_pyramids_that_are_not_plain_are_left_to_the_checks(side, change):
    scene = make_scene(6).to(torch.float32)
    changed = change(list(map(torch.Tensor.detach, getattr(scene, side))))
    more_levels = isinstance(changed, list) and 0 < len(changed) <= 8 and len(changed) > len(getattr(scene, side))
    assert fit(dataclasses.replace(scene, **{side: changed})) == more_levels  # scales are looked at in Python


def test_a_teacher_that_wants_a_gradient_is_left_to_the_checks():
    scene = make_scene(7).to(torch.float32)
    scene.teacher_features[-1].requires_grad_()
    assert not fit(scene)


def test_another_class_of_tensors_is_left_to_the_checks():
    class Own(torch.Tensor):
        pass

    scene = make_scene(8).to(torch.float32)
    assert not fit(scene, labels=scene.labels.as_subclass(Own))
    parameter = torch.nn.Parameter(scene.student_logits.detach())
    assert fit(scene, student_logits=parameter)


def test_on_request_values_are_looked_at(monkeypatch):
    monkeypatch.setenv("TARDKD_CHECK", "1")
    assert not fit(make_scene(9).to(torch.float32))
