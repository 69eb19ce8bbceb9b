"""head_distill_loss against the reference in float64, and against pooled_distill_loss."""

from __future__ import annotations

import re

import pytest
import torch

from .parity import assert_losses_match
from .scenes import make_scene
from .test_edges import BAD_REGIONS, MISFITS, assert_connected_zeros, spoil
from .test_pooled_loss import make_pooled
from .test_region_loss import CLASSIFICATION_GATES, DTYPES, REGRESSION_GATES

OPEN = dict(classification_gate="all", regression_gate="foreground")


@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(backend, dtypes):
    scene = make_scene(171).to(*DTYPES[dtypes], device=backend.device)
    assert_losses_match(backend.ops, scene, heads_alone=True)


@pytest.mark.parametrize("regression_gate", REGRESSION_GATES)
@pytest.mark.parametrize("classification_gate", CLASSIFICATION_GATES)
def test_gates(kernel, classification_gate, regression_gate):
    scene = make_scene(172).to(torch.float32, device=kernel.device)
    gates = dict(classification_gate=classification_gate, regression_gate=regression_gate)
    assert_losses_match(kernel.ops, scene, heads_alone=True, **gates)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_losses(kernel, temperature, reduction, weighted):
    scene = make_scene(173).to(torch.float32, device=kernel.device)
    options = dict(temperature=temperature, reduction=reduction, beta=0.5, box_weights=(1.0, 2.0, 3.0, 4.0))
    if weighted:
        options["region_weights"] = scene.region_weights
    assert_losses_match(kernel.ops, scene, heads_alone=True, **options)


@pytest.mark.parametrize("form", ["agnostic", "specific", "specific+background"])
@pytest.mark.parametrize("background", ["first", "last"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_heads(kernel, activation, background, form):
    scene = make_scene(174, activation=activation, background=background, student_deltas=form, teacher_deltas=form)
    scene = scene.to(torch.float64, device=kernel.device)
    assert_losses_match(kernel.ops, scene, heads_alone=True, activation=activation, background=background)


@pytest.mark.parametrize("classes", [1, 20, 91, 400])  # a warp takes 128 columns in a turn
@pytest.mark.parametrize("regions", [1, 200])
def test_sizes(kernel, regions, classes):
    scene = make_scene(175, regions=regions, classes=classes).to(torch.float32, device=kernel.device)
    assert_losses_match(kernel.ops, scene, heads_alone=True, **OPEN)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_regions_than_threads_add_them_up(kernel, reduction):
    """The last block has 256 threads; 1300 regions are several turns for each, and not the same number for all."""
    scene = make_scene(178, regions=1300, classes=2).to(torch.float32, device=kernel.device)
    assert_losses_match(kernel.ops, scene, heads_alone=True, reduction=reduction, **OPEN)


def test_strided_heads(kernel):
    """Views into wider tensors, as a dense head's rows are."""
    scene = make_scene(176).to(torch.float32, device=kernel.device)
    for name in ("student_logits", "teacher_logits", "student_deltas", "teacher_deltas"):
        setattr(scene, name, getattr(scene, name).detach().T.contiguous().T)
    scene.student_logits.requires_grad_()
    scene.student_deltas.requires_grad_()
    assert_losses_match(kernel.ops, scene, heads_alone=True)


@pytest.mark.parametrize("box_coding", ["deltas", "boxes"])
def test_says_of_the_heads_what_the_pooled_form_says(backend, box_coding):
    scene = make_scene(177, box_coding=box_coding).to(torch.float32, device=backend.device)
    options = dict(box_coding=box_coding, region_weights=scene.region_weights)
    pooled = backend.ops.pooled_distill_loss(*make_pooled(scene), *scene.per_region, **options)
    heads = backend.ops.head_distill_loss(*scene.per_region, **options)
    assert heads.feature == 0
    assert heads.gates.any(0).all() and torch.equal(heads.gates, pooled.gates)
    assert torch.equal(heads.scores, pooled.scores)
    assert torch.equal(heads.classification, pooled.classification) and heads.classification > 0
    assert torch.equal(heads.regression, pooled.regression) and heads.regression > 0
    leaves = [scene.student_logits, scene.student_deltas]
    gradients = (torch.autograd.grad(losses.classification + losses.regression, leaves) for losses in (heads, pooled))
    for gradient, target in zip(*gradients):
        torch.testing.assert_close(gradient, target)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nothing", ["no regions", "no foreground"])
def test_nothing_to_distil(backend, nothing, dtype, reduction):
    scene = make_scene(178)
    scene = scene.rows(slice(0, 0)) if nothing == "no regions" else scene.replace(labels=scene.labels * 0)
    scene = scene.to(dtype, device=backend.device)
    losses = backend.ops.head_distill_loss(*scene.per_region, reduction=reduction)
    assert_connected_zeros(losses, [scene.student_logits, scene.student_deltas], reduction)


@pytest.mark.parametrize("fault", [name for name in BAD_REGIONS if "index" not in name])
def test_bad_regions_contribute_nothing(backend, fault):
    scene = make_scene(179).to(torch.float64, device=backend.device)
    bad = (scene.labels > 0).nonzero()[:, 0][[0, 3]]
    spoil(scene, fault, bad)
    keep = torch.ones(len(scene.labels), dtype=torch.bool, device=backend.device)
    keep[bad] = False
    losses = backend.ops.head_distill_loss(*scene.per_region, reduction="sum", **OPEN)
    expected = backend.ops.head_distill_loss(*scene.rows(keep).per_region, reduction="sum", **OPEN)
    assert not losses.gates[bad].any() and not losses.scores[bad].any()
    torch.testing.assert_close(losses[:3], expected[:3], rtol=1e-12, atol=0)


def test_the_image_index_is_not_looked_at(backend):
    scene = make_scene(180).to(torch.float32, device=backend.device)
    expected = backend.ops.head_distill_loss(*scene.per_region)
    scene.proposals[::3, 0] = float("nan")
    scene.proposals[1::3, 0] = -7
    for got, want in zip(backend.ops.head_distill_loss(*scene.per_region), expected):
        assert torch.equal(got, want)


def test_proposals_as_a_list(backend):
    scene = make_scene(181).to(torch.float32, device=backend.device)
    expected = backend.ops.head_distill_loss(*scene.per_region)
    boxes = scene.proposals[:, 1:]
    listed = scene.replace(proposals=[boxes[:10], boxes[10:10], boxes[10:]])
    for got, want in zip(backend.ops.head_distill_loss(*listed.per_region), expected):
        assert torch.equal(got, want)


FEATURES = "images|levels|scales|maps|map|level|channels|sides|lists|teacher features"  # what other misfits are about


@pytest.mark.parametrize("misfit", [name for name in MISFITS if not re.search(FEATURES, name)])
def test_misfits(backend, misfit):
    """The logits are named where the other losses name the features."""
    change, error, message = MISFITS[misfit]
    scene = make_scene(93).to(torch.float32, device=backend.device)
    scene = scene.replace(**change(scene))
    message = message.replace("student_features", "student_logits")
    if misfit == "device of a head":  # the others are then on another device than this one
        message = "proposals are on (cpu|cuda).* but the logits are on meta"
    with pytest.raises(error, match=message):
        backend.ops.head_distill_loss(*scene.per_region, region_weights=scene.region_weights)


def test_options_of_features_are_none(backend):
    scene = make_scene(182).to(torch.float32, device=backend.device)
    for option in ("feature_gate", "feature_loss", "bin_weight", "student_scales"):
        with pytest.raises(TypeError, match=re.escape(option)):
            backend.ops.head_distill_loss(*scene.per_region, **{option: "all"})
