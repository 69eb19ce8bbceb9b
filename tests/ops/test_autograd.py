"""Gradients as autograd sees them."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

import tardkd.ops.reference

from .scenes import LEVEL_RULE, make_boxes, make_scene
from .test_pooled_loss import make_pooled

OPEN = dict(feature_gate="all", classification_gate="all", regression_gate="foreground")


def small_scene(seed, backend, geometry="strides", **options):
    """Few numbers, so that every derivative can be taken numerically."""
    scene = make_scene(seed, regions=8, images=1, channels=2, geometry=geometry, **options)
    crop = dict(
        student_features=[f[..., :8, :8] for f in scene.student_features[-2:]],
        teacher_features=[f[..., :8, :8] for f in scene.teacher_features[-2:]],
        student_scales=scene.student_scales[-2:],
        teacher_scales=scene.teacher_scales[-2:],
    )
    return scene.replace(**crop).to(torch.float64, device=backend.device)


def losses_of(backend, scene, **options):
    def function(*leaves):
        *features, logits, deltas = leaves
        changed = scene.replace(student_features=features, student_logits=logits, student_deltas=deltas)
        options_ = {**scene.scales, **LEVEL_RULE, "output_size": 2, **options}
        return backend.ops.region_distill_loss(*changed.inputs, **options_)[:3]

    return function


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("geometry", ["equal", "strides"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(feature_loss="smooth_l1", beta=0.5, bin_weight="gaussian"),
        dict(feature_loss="absolute", feature_gate="all", classification_gate="all", temperature=2.0),
    ],
    ids=["defaults", "smooth", "open"],
)
def test_region_loss(backend, deterministic, geometry, reduction, options):
    scene = small_scene(101, backend, geometry)
    function = losses_of(backend, scene, reduction=reduction, **options)
    assert all(loss.any() for loss in function(*scene.leaves))
    assert gradcheck(function, scene.leaves, fast_mode=True)


def test_region_loss_derivative_by_derivative(cpu):
    scene = small_scene(102, cpu)
    scene.student_features = [f.detach()[..., :3, :4].requires_grad_() for f in scene.student_features]
    assert gradcheck(losses_of(cpu, scene, region_weights=scene.region_weights), scene.leaves)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_pooled_loss(backend, activation, reduction):
    scene = small_scene(103, backend, activation=activation)
    student, teacher = make_pooled(scene, torch.float64, torch.float64, size=(2, 3), channels=2)

    def function(pooled, logits, deltas):
        changed = scene.replace(student_logits=logits, student_deltas=deltas)
        options = dict(activation=activation, reduction=reduction, bin_weight="gaussian")
        return backend.ops.pooled_distill_loss(pooled, teacher, *changed.per_region, **options)[:3]

    assert gradcheck(function, (student, scene.student_logits, scene.student_deltas), fast_mode=True)


@pytest.mark.parametrize("box_coding", ["deltas", "boxes"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_head_loss(backend, activation, reduction, box_coding):
    scene = small_scene(106, backend, activation=activation, box_coding=box_coding)

    def function(logits, deltas):
        changed = scene.replace(student_logits=logits, student_deltas=deltas)
        options = dict(activation=activation, reduction=reduction, box_coding=box_coding, temperature=2.0)
        return backend.ops.head_distill_loss(*changed.per_region, **options)[1:3]

    leaves = (scene.student_logits, scene.student_deltas)
    assert all(loss.any() for loss in function(*leaves))
    assert gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("aligned", [False, True], ids=["legacy", "aligned"])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align(backend, deterministic, sampling_ratio, aligned):
    scene = small_scene(104, backend)

    def function(*features):
        options = dict(scales=scene.student_scales, output_size=(2, 3), **LEVEL_RULE)
        return backend.ops.multiscale_roi_align(
            features, scene.proposals, sampling_ratio=sampling_ratio, aligned=aligned, **options
        )

    assert gradcheck(function, scene.student_features, fast_mode=True)


def test_gaussian(backend):
    scene = small_scene(105, backend, "equal")
    gt_boxes = [make_boxes(torch.Generator().manual_seed(0), 6).to(backend.device)]

    def function(*features):
        return backend.ops.gaussian_feature_loss(
            features, scene.teacher_features, gt_boxes, scales=scene.student_scales
        )

    assert gradcheck(function, scene.student_features, fast_mode=True)


# --- using the graph twice ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_two_upstream_gradients_through_one_graph(backend, deterministic, reduction, dtype):
    """The second must not see what the first did to anything that was saved."""
    scene = make_scene(106).to(dtype, device=backend.device)
    losses = backend.ops.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE, **OPEN, reduction=reduction)
    pooled = make_pooled(scene, dtype, dtype)
    pooled_losses = backend.ops.pooled_distill_loss(*pooled, *scene.per_region, **OPEN, reduction=reduction)

    def gradients(factors, retain):
        total = sum(factor * loss.sum() for factor, loss in zip(factors, (*losses[:3], *pooled_losses[:3])))
        return torch.autograd.grad(total, [*scene.leaves, pooled[0]], retain_graph=retain)

    first = gradients((1.0, 2.0, 4.0, 8.0, 1.0, 0.5), True)
    second = gradients((-4.0, 0.5, 16.0, -32.0, 0.25, 8.0), True)
    again = gradients((1.0, 2.0, 4.0, 8.0, 1.0, 0.5), False)
    for one, other in zip(first, again):
        assert torch.equal(one, other)
    levels = len(scene.student_features)
    subnormal = 4 * 2.0**-24 if dtype == torch.float16 else 0.0  # else four times as much is exact
    for one, other in zip(first[:levels], second[:levels]):
        assert one.any()
        torch.testing.assert_close(-4 * one, other, rtol=0, atol=subnormal)
    torch.testing.assert_close(-4 * first[-1], second[-1], rtol=0, atol=subnormal)


def test_two_upstream_gradients_of_the_gaussian_loss(backend):
    scene = make_scene(107).to(torch.float32, device=backend.device)
    gt_boxes = [make_boxes(torch.Generator().manual_seed(1), 4).to(backend.device)] * 2
    loss = backend.ops.gaussian_feature_loss(
        scene.student_features, scene.teacher_features, gt_boxes, scales=scene.student_scales
    )
    first = torch.autograd.grad(loss, scene.student_features, retain_graph=True)
    second = torch.autograd.grad(loss * -8, scene.student_features)
    for one, other in zip(first, second):
        assert torch.equal(-8 * one, other) and one.any()


def test_loss_scaling_keeps_small_gradients_of_half_precision(backend):
    """A gradient below float16's range is there once the loss is scaled by 65536."""
    scene = make_scene(108).to(torch.float16, device=backend.device)
    weights = torch.full_like(scene.region_weights, 1e-6)
    losses = backend.ops.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE, region_weights=weights)
    plain = torch.autograd.grad(losses.feature, scene.student_features, retain_graph=True)
    scaled = torch.autograd.grad(losses.feature * 65536, scene.student_features)
    small, large = (sum(int((gradient != 0).sum()) for gradient in side) for side in (plain, scaled))
    assert large > 2 * small


# --- who gets a gradient ------------------------------------------------------------------------------


def test_no_graph_without_need(backend):
    scene = make_scene(109).to(torch.float32, device=backend.device)
    with torch.no_grad():
        losses = backend.ops.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE)
    assert not any(result.requires_grad for result in losses)
    for leaf in scene.leaves:
        leaf.requires_grad_(False)
    detached = backend.ops.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE)
    assert not any(result.requires_grad for result in detached)
    for one, other in zip(losses, detached):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wanted", range(6))
def test_one_input_alone_may_want_a_gradient(backend, deterministic, wanted, reduction):
    scene = make_scene(110).to(torch.float64, device=backend.device)
    options = dict(**scene.scales, **LEVEL_RULE, **OPEN, reduction=reduction)
    expected = torch.autograd.grad(
        sum(loss.sum() for loss in backend.ops.region_distill_loss(*scene.inputs, **options)[:3]),
        scene.leaves[wanted],
    )
    for index, leaf in enumerate(scene.leaves):
        leaf.requires_grad_(index == wanted)
    losses = backend.ops.region_distill_loss(*scene.inputs, **options)
    actual = torch.autograd.grad(sum(loss.sum() for loss in losses[:3]), scene.leaves[wanted])
    assert torch.equal(actual[0], expected[0]) and actual[0].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("term", range(3))
def test_a_term_alone_reaches_its_own_inputs_alone(backend, term, reduction):
    scene = make_scene(118).to(torch.float32, device=backend.device)
    losses = backend.ops.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE, **OPEN, reduction=reduction)
    pooled = make_pooled(scene)
    pooled_losses = backend.ops.pooled_distill_loss(*pooled, *scene.per_region, **OPEN, reduction=reduction)
    heads = [scene.student_logits, scene.student_deltas]
    for loss, leaves in ((losses[term], scene.leaves), (pooled_losses[term], [pooled[0], *heads])):
        gradients = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        features = len(leaves) - 2
        for index, gradient in enumerate(gradients):
            assert (gradient is not None) == (max(index - features + 1, 0) == term)
            assert gradient is None or gradient.any()


def test_gates_and_scores_carry_no_gradient(backend):
    scene = make_scene(111).to(torch.float32, device=backend.device)
    losses = backend.ops.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE)
    assert not losses.gates.requires_grad and not losses.scores.requires_grad


def test_boxes_get_no_gradient(backend):
    scene = make_scene(112).to(torch.float32, device=backend.device)
    scene.proposals.requires_grad_()
    scene.gt_boxes.requires_grad_()
    losses = backend.ops.region_distill_loss(
        *scene.inputs, **scene.scales, **LEVEL_RULE, bin_weight="gaussian", regression_gate="vs_student"
    )
    sum(losses[:3]).backward()
    assert scene.proposals.grad is None and scene.gt_boxes.grad is None
    options = dict(scales=scene.student_scales)
    backend.ops.multiscale_roi_align(scene.student_features, scene.proposals, **options).sum().backward()
    assert scene.proposals.grad is None


def test_gradients_accumulate(backend, deterministic):
    """backward() adds to .grad, as of any op."""
    scene = make_scene(113).to(torch.float64, device=backend.device)
    for _ in range(2):
        sum(backend.ops.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE)[:3]).backward()
    once = torch.autograd.grad(
        sum(backend.ops.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE)[:3]), scene.leaves
    )
    for leaf, gradient in zip(scene.leaves, once):
        assert torch.equal(leaf.grad, 2 * gradient)


def test_inputs_are_left_alone(backend):
    scene = make_scene(114).to(torch.float32, device=backend.device)
    inputs = [*scene.student_features, *scene.teacher_features, *scene.per_region]
    before = [tensor.detach().clone() for tensor in inputs]
    sum(backend.ops.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE)[:3]).backward()
    for tensor, copy in zip(inputs, before):
        assert torch.equal(tensor, copy)


# --- the kernels differentiate once --------------------------------------------------------------------


def twice(loss, leaf):
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert gradient.any()
    gradient.pow(2).sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_double_backward_is_refused(kernel, reduction):
    """Also where the upstream gradient is a constant, which would let a gradient penalty vanish silently."""
    scene = make_scene(115).to(torch.float32, device=kernel.device)
    for leaf, term in zip((scene.student_features[0], *scene.leaves[-2:]), range(3)):
        losses = kernel.ops.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE, reduction=reduction)
        for loss in (losses[term].sum(), losses[term].pow(2).sum()):
            with pytest.raises(RuntimeError, match="differentiate twice"):
                twice(loss, leaf)


@pytest.mark.parametrize("op", ["pooled", "gaussian", "align"])
def test_double_backward_is_refused_by_the_other_ops(kernel, op):
    scene = make_scene(116).to(torch.float32, device=kernel.device)
    leaf, scales = scene.student_features[0], dict(scales=scene.student_scales)
    if op == "pooled":
        leaf, teacher = make_pooled(scene)
        loss = kernel.ops.pooled_distill_loss(leaf, teacher, *scene.per_region).feature
    elif op == "gaussian":
        gt_boxes = [make_boxes(torch.Generator().manual_seed(1), 4).to(kernel.device)] * 2
        loss = kernel.ops.gaussian_feature_loss(scene.student_features, scene.teacher_features, gt_boxes, **scales)
    else:
        loss = kernel.ops.multiscale_roi_align(scene.student_features, scene.proposals, **scales, **LEVEL_RULE).sum()
    with pytest.raises(RuntimeError, match="differentiate twice"):
        twice(loss, leaf)


def test_a_graph_over_the_gradients_is_allowed_while_nobody_differentiates_them(kernel, deterministic):
    scene = make_scene(117).to(torch.float32, device=kernel.device)
    losses = kernel.ops.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE, **OPEN)
    expected = torch.autograd.grad(sum(losses[:3]), scene.leaves, retain_graph=True)
    actual = torch.autograd.grad(sum(losses[:3]), scene.leaves, create_graph=True)
    for got, want in zip(actual, expected):
        assert torch.equal(got, want) and got.any()


# --- derivatives that the kernels do not have -----------------------------------------------------------


def scalar_of_a_map(ops, scene, op):
    """A function of one feature map with a curvature, and the map."""
    others, scales = scene.student_features[1:], dict(scales=scene.student_scales)
    gt_boxes = [make_boxes(torch.Generator().manual_seed(1), 4).to(scene.labels.device)] * 2
    per_region = [x.detach() for x in scene.per_region]
    functions = {
        "region": lambda x: (
            ops.region_distill_loss(
                [x, *others], scene.teacher_features, *per_region, **scene.scales, **LEVEL_RULE
            ).feature
        ),
        "region, all gates open": lambda x: (
            ops.region_distill_loss(
                [x, *others], scene.teacher_features, *per_region, **scene.scales, **LEVEL_RULE, feature_gate="all"
            ).feature
        ),
        "align": lambda x: ops.multiscale_roi_align([x, *others], scene.proposals, **scales, **LEVEL_RULE).pow(2).sum(),
        "gaussian": lambda x: ops.gaussian_feature_loss([x, *others], scene.teacher_features, gt_boxes, **scales),
    }
    return functions[op], scene.student_features[0].detach()


def tangent_of(function, x):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return torch.autograd.forward_ad.unpack_dual(function(dual)).tangent


SECOND = {
    "hvp": lambda f, x: torch.autograd.functional.hvp(f, x, torch.ones_like(x))[1],
    "vhp": lambda f, x: torch.autograd.functional.vhp(f, x, torch.ones_like(x))[1],
}
FORWARD = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "dual numbers": tangent_of,
    "func.grad": lambda f, x: torch.func.grad(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
}


@pytest.mark.parametrize("derivative", [*SECOND, *FORWARD])
@pytest.mark.parametrize("op", ["region", "region, all gates open", "align", "gaussian"])
def test_a_derivative_that_the_kernels_lack_is_refused(kernel, op, derivative):
    """Not silently zero: the reference, which has all of them, shows that it is not."""
    scene = make_scene(119).to(torch.float64, device=kernel.device)
    function, x = scalar_of_a_map(tardkd.ops.reference, scene, op)
    compute = {**SECOND, **FORWARD}[derivative]
    if derivative != "vmap":  # the reference's regions are found by nonzero
        assert compute(function, x).any()
    function, x = scalar_of_a_map(kernel.ops, scene, op)
    message = "differentiate twice" if derivative in SECOND else "none for forward mode or the transforms of torch.func"
    with pytest.raises(RuntimeError, match=message):
        compute(function, x)


def test_a_transform_of_something_else_leaves_the_ops_alone(kernel):
    scene = make_scene(120).to(torch.float64, device=kernel.device)
    for leaf in scene.leaves:
        leaf.requires_grad_(False)
    function, x = scalar_of_a_map(kernel.ops, scene, "region")
    expected = function(x)
    assert torch.equal(torch.func.grad(lambda w: w * function(x))(torch.ones_like(expected)), expected)
