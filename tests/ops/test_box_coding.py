"""Boxes in the place of deltas."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_values_close

from tardkd.ops import reference

from .parity import assert_losses_match
from .scenes import encode, make_scene
from .test_edges import INF, NAN, region_loss
from .test_pooled_loss import make_pooled
from .test_region_loss import DTYPES, REGRESSION_GATES

BOXES = dict(box_coding="boxes")
OPEN = dict(regression_gate="foreground", **BOXES)


def scene_of_boxes(seed, **options):
    return make_scene(seed, **{**dict(student_deltas="agnostic", teacher_deltas="agnostic"), **BOXES, **options})


@pytest.mark.parametrize("regression_gate", REGRESSION_GATES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes_and_gates(backend, dtypes, regression_gate):
    scene = scene_of_boxes(161).to(*DTYPES[dtypes], device=backend.device)
    options = dict(regression_gate=regression_gate, **BOXES)
    assert_losses_match(backend.ops, scene, **options)
    assert_losses_match(backend.ops, scene, pooled=make_pooled(scene, *DTYPES[dtypes]), **options)
    assert_losses_match(backend.ops, scene, heads_alone=True, **options)


@pytest.mark.parametrize("form", ["specific", "specific+background"])
@pytest.mark.parametrize("background", ["first", "last"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_boxes_of_every_class(kernel, activation, background, form):
    """In the columns that the deltas would have."""
    scene = scene_of_boxes(
        162, activation=activation, background=background, student_deltas=form, teacher_deltas="agnostic"
    ).to(torch.float64, device=kernel.device)
    options = dict(activation=activation, background=background, **BOXES)
    assert_losses_match(kernel.ops, scene, regression_gate="vs_student", **options)
    assert_losses_match(kernel.ops, scene, reduction="none", region_weights=scene.region_weights, **options)


@pytest.mark.parametrize("options", [dict(beta=0.0), dict(beta=2.0), dict(box_weights=(1.0, 2.0, 3.0, 4.0))], ids=str)
def test_numbers(kernel, options):
    scene = scene_of_boxes(163).to(torch.float64, device=kernel.device)
    assert_losses_match(kernel.ops, scene, **OPEN, **options)


def one_region(proposal, student, teacher, gt_box, device="cpu", dtype=torch.float64):
    """A scene of one foreground region with these boxes."""
    scene = scene_of_boxes(164, regions=1, images=1)
    foreground = torch.ones_like(scene.labels)
    boxes = [torch.tensor([box], dtype=torch.float64) for box in (student, teacher)]
    scene = scene.replace(labels=foreground, student_deltas=boxes[0], teacher_deltas=boxes[1])
    scene = scene.replace(proposals=torch.tensor([[0.0, *proposal]]), gt_boxes=torch.tensor([gt_box]))
    return scene.to(dtype, device=device)


def test_one_region_by_hand(backend):
    """Centres 2 and 1 pixels apart, sizes 4 and 2, in a frame of 10 x 20 pixels."""
    student, teacher = [2.0, 3.0, 12.0, 23.0], [2.0, 3.0, 8.0, 21.0]
    scene = one_region([0.0, 0.0, 10.0, 20.0], student, teacher, teacher, device=backend.device)
    losses = region_loss(backend, scene, beta=0.0, box_weights=(10.0, 20.0, 3.0, 5.0), **OPEN)
    expected = 10 * 2 / 10 + 20 * 1 / 20 + 3 * 4 / 10 + 5 * 2 / 20
    assert losses.regression.item() == pytest.approx(expected, rel=1e-14)
    (gradient,) = torch.autograd.grad(losses.regression, scene.student_deltas)
    by_hand = [0.5 - 0.3, 0.5 - 0.25, 0.5 + 0.3, 0.5 + 0.25]
    torch.testing.assert_close(gradient, gradient.new_tensor([by_hand]), rtol=1e-14, atol=0)
    assert losses.scores[0, 2] == 1.0
    assert losses.scores[0, 3].item() == pytest.approx(6 * 17 / (200 + 108 - 6 * 17), rel=1e-14)


def test_boxes_near_the_proposal_count_as_their_deltas_do(backend):
    scene = scene_of_boxes(165, regions=60)
    boxes = scene.proposals[:, 1:].double()
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1).repeat(1, 2)
    generator = torch.Generator().manual_seed(0)
    near = [boxes + 1e-5 * size * torch.randn(boxes.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    ordinary = (boxes[:, 2:] - boxes[:, :2]).min(1).values > 1
    scene = scene.replace(student_deltas=near[0], teacher_deltas=near[1]).rows(ordinary)
    scene = scene.to(torch.float64, device=backend.device)
    options = dict(regression_gate="foreground", reduction="none")
    of_boxes = region_loss(backend, scene, **options, **BOXES).regression
    for side, given in zip(("student_deltas", "teacher_deltas"), near):
        coded = encode(boxes, given)[ordinary].to(backend.device)
        setattr(scene, side, coded.requires_grad_(side == "student_deltas"))
    of_deltas = region_loss(backend, scene, **options).regression
    assert of_deltas.any()
    torch.testing.assert_close(of_boxes, of_deltas, rtol=1e-3, atol=0)


STRANGE_BOXES = {
    "inverted": [50.0, 60.0, 20.0, 10.0],
    "inverted across": [50.0, 10.0, 20.0, 60.0],
    "empty": [30.0, 30.0, 30.0, 30.0],
    "without height": [10.0, 30.0, 60.0, 30.0],
    "huge": [-1e30, -1e30, 1e30, 1e30],
    "far away": [1e30, 1e30, 2e30, 2e30],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", STRANGE_BOXES)
def test_strange_boxes_have_finite_losses_and_gradients(backend, kind, side, dtype):
    ordinary, strange = [12.0, 12.0, 40.0, 50.0], STRANGE_BOXES[kind]
    pair = (strange, ordinary) if side == "student" else (ordinary, strange)
    scene = one_region([10.0, 10.0, 42.0, 44.0], *pair, ordinary, backend.device, dtype)
    losses = region_loss(backend, scene, **OPEN)
    (gradient,) = torch.autograd.grad(losses.regression, scene.student_deltas)
    assert losses.regression.isfinite() and losses.regression > 0
    assert gradient.isfinite().all() and gradient.any()
    assert_losses_match(backend.ops, scene, **OPEN)
    for gate in ("vs_proposal", "vs_student"):
        losses = region_loss(backend, scene, regression_gate=gate, **BOXES)
        assert losses.gates[0, 2] == (side == "student")  # the strange box is the worse one
        assert losses.scores.isfinite().all()
        assert losses.scores[0, 2 if side == "teacher" else 3] < 1e-20 or (gate == "vs_proposal" and side == "student")


@pytest.mark.parametrize("proposal", [[30.0, 30.0, 30.0, 30.0], [30.0, 10.0, 30.0, 50.0], [50.0, 50.0, 10.0, 10.0]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_side_of_the_proposal_counts_at_least_a_pixel(backend, proposal, dtype):
    student, teacher = [12.0, 12.0, 41.0, 50.0], [12.0, 12.0, 40.0, 50.0]
    scene = one_region(proposal, student, teacher, teacher, backend.device, dtype)
    losses = region_loss(backend, scene, beta=0.0, **OPEN)
    assert losses.regression.item() == 10 * 0.5 + 5 * 1.0
    assert losses.scores[0, 2:].tolist() == [1.0, 0.0]
    assert_losses_match(backend.ops, scene, **OPEN)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_box_that_is_not_finite_closes_its_gate(backend, value):
    scene = scene_of_boxes(166).to(torch.float32, device=backend.device)
    scene.teacher_deltas[::2, 0] = value
    scene.student_deltas.data[1::2, 3] = value
    losses = region_loss(backend, scene, regression_gate="vs_proposal", **BOXES)
    assert not losses.gates[::2, 2].any()
    expected = reference.region_distill_loss(
        *scene.doubled().inputs, **scene.scales, canonical_scale=56, regression_gate="vs_proposal", **BOXES
    )
    assert losses.gates[:, 2].tolist() == expected.gates[:, 2].tolist()
    assert losses.scores[:, 2].isnan().tolist() == expected.scores[:, 2].isnan().tolist()


def test_inverted_boxes_of_both_sides_are_no_overlap(backend):
    """Two negative extents would make a positive area."""
    inverted = [50.0, 60.0, 20.0, 10.0]
    scene = one_region([10.0, 10.0, 42.0, 44.0], inverted, inverted, [20.0, 10.0, 50.0, 60.0], backend.device)
    losses = region_loss(backend, scene, regression_gate="vs_student", **BOXES)
    assert not losses.scores[0, 2:].any() and not losses.gates[0, 2]
    assert_values_close(losses.regression, torch.zeros(()), torch.float64, "regression loss")


def test_deltas_are_the_default(backend):
    scene = make_scene(167).to(torch.float32, device=backend.device)
    for got, want in zip(region_loss(backend, scene), region_loss(backend, scene, box_coding="deltas")):
        assert torch.equal(got, want)
