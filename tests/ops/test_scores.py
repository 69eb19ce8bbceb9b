"""Scores from outside, in the place of the class gate's probabilities."""

from __future__ import annotations

import pytest
import torch

from .parity import assert_losses_match
from .scenes import make_scene
from .test_edges import NAN, region_loss
from .test_pooled_loss import make_pooled
from .test_region_loss import DTYPES


def make_scores(scene, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(scene.labels))
    student, teacher = torch.rand(2, len(scene.labels), generator=generator).to(scene.labels.device, dtype)
    return dict(student_scores=student, teacher_scores=teacher)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(backend, dtypes, activation):
    student, teacher = DTYPES[dtypes]
    scene = make_scene(191, activation=activation).to(student, teacher, device=backend.device)
    for dtype in {teacher, torch.float32}:
        options = dict(activation=activation, **make_scores(scene, dtype))
        assert_losses_match(backend.ops, scene, **options)
        assert_losses_match(backend.ops, scene, pooled=make_pooled(scene, student, teacher), **options)
        assert_losses_match(backend.ops, scene, heads_alone=True, reduction="none", **options)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_one_side_may_have_them(kernel, side):
    scene = make_scene(192).to(torch.float64, device=kernel.device)
    name = f"{side}_scores"
    assert_losses_match(kernel.ops, scene, heads_alone=True, **{name: make_scores(scene, torch.float64)[name]})


def test_strides(kernel):
    scene = make_scene(193).to(torch.float32, device=kernel.device)
    scores = {name: torch.stack([given, given + 99], 1)[:, 0] for name, given in make_scores(scene).items()}
    assert_losses_match(kernel.ops, scene, heads_alone=True, **scores)


def test_they_decide_and_are_told(backend):
    scene = make_scene(194).to(torch.float32, device=backend.device)
    plain = region_loss(backend, scene)
    teacher = torch.linspace(0, 1, len(scene.labels), device=backend.device)
    losses = region_loss(backend, scene, student_scores=torch.full_like(teacher, 0.5), teacher_scores=teacher)
    assert losses.gates[:, 1].tolist() == ((scene.labels > 0) & (teacher > 0.5)).tolist()
    assert torch.equal(losses.scores[:, 0], teacher) and (losses.scores[:, 1] == 0.5).all()
    assert torch.equal(losses.scores[:, 2:], plain.scores[:, 2:])
    assert torch.equal(losses.regression, plain.regression)
    swapped = dict(student_scores=plain.scores[:, 1], teacher_scores=plain.scores[:, 0])
    for got, want in zip(region_loss(backend, scene, **swapped), plain):
        assert torch.equal(got, want)


def test_no_gradient_flows_into_them(backend):
    scene = make_scene(195).to(torch.float32, device=backend.device)
    scores = make_scores(scene)
    scores["student_scores"].requires_grad_()
    losses = region_loss(backend, scene, **scores)
    leaves = [scene.student_logits, scores["student_scores"]]
    of_logits, of_scores = torch.autograd.grad(losses.classification, leaves, allow_unused=True)
    assert of_logits.any() and of_scores is None
    for leaf in scene.leaves:
        leaf.requires_grad_(False)
    assert not any(result.requires_grad for result in region_loss(backend, scene, **scores))


def test_what_is_wrong_with_them(backend):
    """A NaN closes its gate and shows; a region that is left out has no score."""
    scene = make_scene(196).to(torch.float32, device=backend.device)
    scores = make_scores(scene)
    scores["teacher_scores"][::2] = NAN
    scene.labels[:4] = -1
    losses = region_loss(backend, scene, **scores)
    assert not losses.gates[::2, 1].any() and losses.gates[1::2, 1].any()
    assert not losses.scores[:4].any() and losses.scores[4::2, 0].isnan().all()
    assert losses.classification.isfinite()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_misfits(backend, side):
    scene = make_scene(197).to(torch.float32, device=backend.device)
    name, scores = f"{side}_scores", torch.rand(len(scene.labels), device=backend.device)
    for given, error, message in (
        (scores[:5], ValueError, f"{name} has 5 rows but proposals hold 32 regions"),
        (scores[:, None], ValueError, rf"{name} must have shape \(R\), got \(32, 1\)"),
        (scores.int(), TypeError, f"{name} must be one of .*torch.int32"),
        (scores.tolist(), TypeError, f"{name} must be a tensor .*list"),
        (scores.to("meta"), ValueError, f"{name} is on meta but student_features is on (cpu|cuda)"),
    ):
        with pytest.raises(error, match=message):
            region_loss(backend, scene, **{name: given})
    with pytest.raises(ValueError, match=r"teacher_scores requires grad.*detach"):
        region_loss(backend, scene, teacher_scores=scores.requires_grad_())
