"""The tap behind the student's pyramid: the same gradients, made in place, for every family."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tardkd import ops
from tardkd.distill import Distiller, DistillSettings, Teacher
from tardkd.distill import distiller as distiller_module
from tardkd.distill.tapping import tapped_maps

from .families import FAMILIES, NAMES, build, planted
from .test_families import OwnOps

SETTINGS = dict(path="pyramid", feature_norm="none", feature_gate="foreground", classification_gate="foreground")


# Of two teachers the first teaches one class, the second the other two.
SHARES: dict[int, list[dict[str, None]]] = {1: [{}], 2: [{"disc": None, "bar": None}, {"box": None}]}


def gradients_of(student: str, *teachers: str) -> tuple[list[torch.Tensor], list[str]]:
    """Of the student's parameters in one step, and our ops of its backward pass."""
    pupil = build(student)
    masters = [
        Teacher(build(family, seed), NAMES, class_map)
        for seed, (family, class_map) in enumerate(zip(teachers, SHARES[len(teachers)]), start=1)
    ]
    distiller = Distiller(pupil, masters, DistillSettings(**SETTINGS), student_classes=NAMES).train()
    distiller._watch_balance = lambda *_: None  # it makes gradients of its own
    torch.manual_seed(5)
    losses = distiller(*planted())
    with OwnOps() as called:
        torch.stack(list(losses.values())).sum().backward()
    return [weight.grad for weight in pupil.parameters() if weight.grad is not None], called.names


def assert_same_without_a_tap(monkeypatch, tapped: list[torch.Tensor], student: str, *teachers: str) -> None:
    monkeypatch.setattr(distiller_module, "tapped_maps", lambda module, losses: nullcontext([]))
    plain, called = gradients_of(student, *teachers)
    assert "region_distill_add" not in called
    largest = max(float(gradient.abs().max()) for gradient in plain)  # some, such as a bias's before a norm, are noise
    for one, other in zip(tapped, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_without_a_tap(monkeypatch, family):
    tapped, called = gradients_of(family, family)
    assert "region_distill_add" in called and "region_distill" not in called
    assert_same_without_a_tap(monkeypatch, tapped, family, family)


def test_maps_that_an_adapter_has_made_are_none_of_the_tap_s(monkeypatch):
    tapped, called = gradients_of("ssd", "retinanet")
    assert "region_distill_add" not in called
    assert_same_without_a_tap(monkeypatch, tapped, "ssd", "retinanet")


@pytest.mark.parametrize("family", FAMILIES)
def test_two_teachers_add_to_one_tap(monkeypatch, family):
    tapped, called = gradients_of(family, family, family)
    assert called.count("region_distill_add") == 2 and "region_distill" not in called
    assert_same_without_a_tap(monkeypatch, tapped, family, family, family)


@pytest.mark.parametrize("teachers", [("fcos", "retinanet"), ("retinanet", "fcos")])
def test_of_two_teachers_one_may_need_an_adapter(monkeypatch, teachers):
    """The tap then waits for one loss that never comes; FCOS's maps have 32 channels, RetinaNet's 8."""
    tapped, called = gradients_of("retinanet", *teachers)
    assert called.count("region_distill_add") == 1
    assert_same_without_a_tap(monkeypatch, tapped, "retinanet", *teachers)


# --- the hook ---------------------------------------------------------------------------------------------------------


def test_maps_are_replaced_in_any_structure_and_the_rest_is_left():
    class Trunk(nn.Module):
        def forward(self, image):
            other = image[:, 0]
            return OrderedDict(maps=[image * 1, (image * 2, other)], again=image), other

    trunk, image = Trunk(), torch.ones(1, 3, 4, 4, requires_grad=True)
    with tapped_maps(trunk, 1) as taps:
        assert not taps
        output, other = trunk(image)
        second, _ = trunk(image)
    [tap] = taps
    assert output["again"] is not image and tap.original(output["again"]) is image
    assert [tuple(level.shape) for level in tap.given] == [(1, 3, 4, 4)] * 3
    assert output["maps"][1][1] is other and isinstance(output, OrderedDict)
    assert torch.equal(output["maps"][0], image) and tap.original(output["maps"][0]) is tap.given[0]
    assert all(tap.original(level) is level for level in (second["again"], second["maps"][0]))
    assert not trunk._forward_hooks


@pytest.mark.parametrize("module, losses", [(None, 1), (nn.Identity(), 0)])
def test_nobody_to_serve(module, losses):
    with tapped_maps(module, losses) as taps:
        if module is not None:
            module(torch.ones(1, 3, 4, 4, requires_grad=True))
    assert taps == []


def test_a_tap_goes_when_the_pass_fails():
    trunk = nn.Identity()
    with pytest.raises(RuntimeError, match="the pass"), tapped_maps(trunk, 1):
        raise RuntimeError("the pass")
    assert not trunk._forward_hooks and isinstance(ops.tap_features([]), ops.FeatureTap)
