"""The feature term's gradient, added to the one that the detector's own losses have for the features."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tolerances import assert_tensors_close
from torch import Tensor

from tardkd import ops
from tardkd.ops import reference

from .parity import UPSTREAM
from .scenes import GEOMETRIES, LAYOUTS, LEVEL_RULE, make_scene


class Handed(torch.autograd.Function):
    """Sums a feature times weights; its backward pass hands ``gradient`` over and notes where it lies."""

    @staticmethod
    def forward(ctx, feature, weight, notes):
        ctx.save_for_backward(weight)
        ctx.notes = notes
        return (feature.double() * weight.double()).sum()

    @staticmethod
    def backward(ctx, upstream):
        [weight] = ctx.saved_tensors
        gradient = weight * upstream.to(weight)
        ctx.notes.append(gradient.data_ptr())
        return gradient, None, None


def weights_of(features: list[Tensor]) -> list[Tensor]:
    """A pyramid of some gradients, of the size that the term's have."""
    generator = torch.Generator().manual_seed(3)
    weights = []
    for feature in features:
        weight = 1e-3 * torch.randn(feature.shape, generator=generator, dtype=torch.float64)
        weights.append(torch.empty_like(feature).copy_(weight))
    return weights


def distil(tardkd_ops, scene, features, tap=None, **options):
    inputs = (features, *scene.inputs[1:])
    options = {**scene.scales, **LEVEL_RULE, **options}
    return tardkd_ops.region_distill_loss(*inputs, **options, **({} if tap is None else dict(tap=tap)))


def total_of(losses) -> Tensor:
    return sum(weight * loss for weight, loss in zip(UPSTREAM, losses[:3]))


def tapped_step(scene, notes: list[int] | None = None, **options) -> Tensor:
    """The total of a step whose detector reads the features too."""
    tap = ops.tap_features(scene.student_features)
    losses = distil(ops, scene, scene.student_features, tap, **options)
    weights, notes = weights_of(scene.student_features), [] if notes is None else notes
    return total_of(losses) + sum(Handed.apply(f, w, notes) for f, w in zip(tap.features, weights)).float()


def plain_step(tardkd_ops, scene, **options) -> Tensor:
    losses = distil(tardkd_ops, scene, scene.student_features, **options)
    weights = weights_of(scene.student_features)
    return total_of(losses) + sum((f.double() * w.double()).sum() for f, w in zip(scene.student_features, weights))


def assert_step_matches(scene, **options) -> None:
    actual = torch.autograd.grad(tapped_step(scene, **options), scene.leaves)
    # What the detector's losses say is what was rounded to the features' dtype.
    wide = scene.doubled()
    losses = distil(reference, wide, wide.student_features, **options)
    weights = weights_of(scene.student_features)
    total = total_of(losses) + sum((f * w.double()).sum() for f, w in zip(wide.student_features, weights))
    for gradient, expected in zip(actual, torch.autograd.grad(total, wide.leaves)):
        assert_tensors_close(gradient, expected, scene.student_features[0].dtype)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("gate", ["all", "either"])
def test_gradients_are_those_of_the_reference(kernel, geometry, gate):
    assert_step_matches(make_scene(141, geometry=geometry).to(torch.float32, device=kernel.device), feature_gate=gate)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_and_layouts(kernel, dtype, layout):
    scene = make_scene(142).to(dtype, None, layout, "nchw", kernel.device)
    assert_step_matches(scene, feature_gate="foreground", bin_weight="gaussian")


def test_deterministic(kernel, deterministic):
    scene = make_scene(143).to(torch.float32, device=kernel.device)
    first = torch.autograd.grad(tapped_step(scene, feature_gate="foreground"), scene.student_features)
    second = torch.autograd.grad(tapped_step(scene, feature_gate="foreground"), scene.student_features)
    assert all(map(torch.equal, first, second))
    assert_step_matches(scene, feature_gate="foreground")


@pytest.mark.parametrize(
    "options", [dict(reduction="none"), dict(feature_norm="channel"), dict(reduction="sum")], ids=str
)
def test_where_it_cannot_serve_autograd_adds(kernel, options):
    scene = make_scene(144).to(torch.float32, device=kernel.device)

    def gradients(tap):
        losses = distil(ops, scene, scene.student_features, tap, feature_gate="foreground", **options)
        total = sum(loss.sum() for loss in losses[:3])
        read = scene.student_features if tap is None else tap.features
        return torch.autograd.grad(total + sum(f.sum() for f in read), scene.leaves)

    for one, other in zip(gradients(ops.tap_features(scene.student_features)), gradients(None)):
        assert_tensors_close(one, other.double(), torch.float32)


def test_the_reference_ignores_it():
    scene = make_scene(144)
    tap = ops.tap_features(scene.student_features)
    losses = distil(reference, scene, scene.student_features, tap)
    assert all(map(torch.equal, losses[:3], distil(reference, scene, scene.student_features)[:3]))


def test_gradcheck(host):
    scene = make_scene(145, geometry="levels").to(torch.float64)

    def step(first, second):
        tap = ops.tap_features([first, second])
        losses = distil(ops, scene, [first, second], tap, feature_gate="foreground", classification_gate="all")
        return losses.feature + sum(f.square().sum() for f in tap.features)

    small = [f.detach()[:, :, :6, :7].contiguous().requires_grad_() for f in scene.student_features]
    scene.teacher_features = [f[:, :, :6, :7] for f in scene.teacher_features]
    assert torch.autograd.gradcheck(step, small, fast_mode=True)


# --- whose memory it is -----------------------------------------------------------------------------------------------


def addresses_of(scene, keep=None, **options) -> tuple[list[int], list[int]]:
    """Where the detector's gradients lay, and where the sums lie."""
    handed: list[int] = []
    sums: list[int] = []
    features = [f.detach().requires_grad_() for f in scene.student_features]
    inner = [f.mul(1) for f in features]
    for feature in inner:
        feature.register_hook(lambda gradient: sums.append(gradient.data_ptr()))
    scene.student_features = inner
    tap = ops.tap_features(inner)
    if keep is not None:
        for feature in tap.features:
            feature.register_hook(keep)
    total = total_of(distil(ops, scene, inner, tap, feature_gate="foreground"))
    weights = weights_of(inner)
    total = total + sum(Handed.apply(f, w, handed) for f, w in zip(tap.features, weights)).float()
    total.backward(**options)
    return sorted(handed), sorted(sums)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("options", [{}, dict(retain_graph=True)], ids=str)
def test_what_nobody_else_holds_is_added_to_in_place(host, layout, options):
    scene = make_scene(146).to(torch.float32, None, layout, layout)
    handed, sums = addresses_of(scene, **options)
    assert handed == sums


@pytest.mark.parametrize("view", [lambda g: g, lambda g: g.view(-1), lambda g: g.detach(), lambda g: g[0]], ids="abcd")
def test_what_a_hook_keeps_is_left_alone(host, view):
    kept: list[tuple[Tensor, Tensor]] = []
    scene = make_scene(146).to(torch.float32)
    handed, sums = addresses_of(scene, keep=lambda gradient: kept.append((view(gradient), view(gradient).clone())))
    assert not {*handed} & {*sums}
    assert kept and all(torch.equal(now, then) for now, then in kept)


def test_an_expanded_gradient_is_copied(host):
    scene = make_scene(147).to(torch.float32)
    expected = torch.autograd.grad(
        total_of(distil(ops, scene, scene.student_features)) + sum(f.sum() for f in scene.student_features),
        scene.leaves,
    )
    tap = ops.tap_features(scene.student_features)
    total = total_of(distil(ops, scene, scene.student_features, tap)) + sum(f.sum() for f in tap.features)
    for one, other in zip(torch.autograd.grad(total, scene.leaves), expected):
        assert_tensors_close(one, other.double(), torch.float32)


def test_a_gradient_that_goes_to_another_branch_too_is_left_alone(host):
    scene = make_scene(148).to(torch.float32)
    leaves = [torch.zeros_like(f, requires_grad=True) for f in scene.student_features]
    others = [leaf.view_as(leaf) for leaf in leaves]  # made before the tap, so that its turn comes before theirs
    tap = ops.tap_features(scene.student_features)
    weights = weights_of(others)
    read = sum(((f + other) * w).sum() for f, other, w in zip(tap.features, others, weights))
    (total_of(distil(ops, scene, scene.student_features, tap, feature_gate="foreground")) + read).backward()
    assert all(torch.equal(leaf.grad, w) for leaf, w in zip(leaves, weights))


def test_a_gradient_that_was_asked_for_is_left_alone(host):
    scene = make_scene(148).to(torch.float32)
    tap = ops.tap_features(scene.student_features)
    weights = weights_of(tap.features)
    total = total_of(distil(ops, scene, scene.student_features, tap, feature_gate="foreground"))
    total = total + sum((f * w).sum() for f, w in zip(tap.features, weights))
    gradients = torch.autograd.grad(total, [*tap.features, *scene.student_features])
    levels = len(weights)
    assert all(map(torch.equal, gradients[:levels], weights))
    assert not any(map(torch.equal, gradients[levels:], weights))


@pytest.mark.parametrize("kept_by", ["save_for_backward", "attribute"])
def test_a_gradient_that_its_maker_keeps_is_left_alone(host, kept_by):
    """Such as a constant that a backward pass returns each time."""

    class Constant(torch.autograd.Function):
        @staticmethod
        def forward(ctx, feature, constant):
            ctx.constant = constant.clone()
            ctx.save_for_backward(ctx.constant)
            if kept_by == "save_for_backward":
                del ctx.constant
            return (feature * constant).sum()

        @staticmethod
        def backward(ctx, upstream):
            return (ctx.saved_tensors[0] if kept_by == "save_for_backward" else ctx.constant), None

    scene = make_scene(149).to(torch.float32)
    tap = ops.tap_features(scene.student_features)
    total = total_of(distil(ops, scene, scene.student_features, tap, feature_gate="foreground"))
    total = total + sum(Constant.apply(f, w) for f, w in zip(tap.features, weights_of(tap.features)))
    first = [g.clone() for g in torch.autograd.grad(total, scene.student_features, retain_graph=True)]
    second = torch.autograd.grad(total, scene.student_features)
    for one, other in zip(first, second):
        assert_tensors_close(one, other.double(), torch.float32)


# --- passes -----------------------------------------------------------------------------------------------------------


def test_each_pass_has_its_own_factor(host):
    """Whatever was asked for before leaves no trace in the next pass."""
    scene = make_scene(150).to(torch.float32)
    features = scene.student_features
    tap = ops.tap_features(features)
    losses = distil(ops, scene, features, tap, feature_gate="foreground")
    detector = sum((f * w).sum() for f, w in zip(tap.features, weights_of(features)))
    plain = distil(ops, scene, features, feature_gate="foreground")
    [expected] = [torch.autograd.grad(plain.feature, features)]

    torch.autograd.grad(3 * losses.feature + losses.regression, scene.student_deltas, retain_graph=True)
    alone = torch.autograd.grad(detector, features, retain_graph=True)
    assert all(map(torch.equal, alone, weights_of(features)))
    for factor in (1.0, -0.25):
        for gradient, wanted in zip(
            torch.autograd.grad(factor * losses.feature, features, retain_graph=True), expected
        ):
            assert_tensors_close(gradient, factor * wanted.double(), torch.float32)
    none = torch.autograd.grad(losses.classification, features, retain_graph=True, allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in none)
    last = torch.autograd.grad(detector + losses.feature, features)
    for gradient, wanted, weight in zip(last, expected, weights_of(features)):
        assert_tensors_close(gradient, wanted.double() + weight.double(), torch.float32)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(losses.feature, features)


def test_gradients_of_handed_features_are_the_detectors_alone(host):
    scene = make_scene(150).to(torch.float32)
    tap = ops.tap_features(scene.student_features)
    losses = distil(ops, scene, scene.student_features, tap)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(losses.feature, tap.features)


def test_levels_without_readers_and_levels_that_do_not_train(host):
    scene = make_scene(151).to(torch.float32)
    features = [f.detach().requires_grad_(level != 1) for level, f in enumerate(scene.student_features)]
    trained = [f for f in features if f.requires_grad]
    tap = ops.tap_features(features)
    assert [f.requires_grad for f in tap.features] == [f.requires_grad for f in features]
    assert tap.features[1] is features[1]
    total = distil(ops, scene, features, tap, feature_gate="foreground").feature + tap.features[0].square().sum()
    plain = distil(ops, scene, features, feature_gate="foreground").feature + features[0].square().sum()
    for one, other in zip(torch.autograd.grad(total, trained), torch.autograd.grad(plain, trained)):
        assert_tensors_close(one, other.double(), torch.float32)


def test_losses_of_several_teachers(host):
    scene, second = make_scene(152).to(torch.float32), make_scene(153).to(torch.float32)
    features = scene.student_features

    def total(tap):
        one = distil(ops, scene, features, tap, feature_gate="foreground")
        other = distil(
            ops, second, features[1:], tap, feature_gate="foreground", student_scales=scene.student_scales[1:]
        )
        read = features if tap is None else tap.features
        return total_of(one) + 3 * other.feature + sum((f * w).sum() for f, w in zip(read, weights_of(features)))

    tapped = torch.autograd.grad(total(ops.tap_features(features, losses=2)), features)
    for one, other in zip(tapped, torch.autograd.grad(total(None), features)):
        assert_tensors_close(one, other.double(), torch.float32)
    with pytest.raises(ValueError, match="for 1 losses"):
        total(ops.tap_features(features))


def test_the_detector_may_be_differentiated_twice(host):
    scene = make_scene(154).to(torch.float32)
    features = scene.student_features
    tap = ops.tap_features(features)
    losses = distil(ops, scene, features, tap, feature_gate="foreground")
    detector = sum(f.pow(3).sum() for f in tap.features)
    gradients = torch.autograd.grad(detector, features, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in gradients), features, retain_graph=True)
    for gradient, feature in zip(second, features):
        torch.testing.assert_close(gradient, 6 * feature.detach())
    both = torch.autograd.grad(detector + losses.feature, features, create_graph=True)
    plain = distil(ops, scene, features, feature_gate="foreground").feature + sum(f.pow(3).sum() for f in features)
    for gradient, expected in zip(both, torch.autograd.grad(plain, features)):
        assert_tensors_close(gradient, expected.double(), torch.float32)
    with pytest.raises(RuntimeError, match="cannot differentiate twice"):
        torch.autograd.grad(sum(g.sum() for g in both), features)


def test_changed_features(host):
    scene = make_scene(155).to(torch.float32)
    features = [f * 1 for f in scene.student_features]
    tap = ops.tap_features(features)
    tap.features[0].relu_()  # as a head may do
    assert not tap.holds(features) and tap.original(tap.features[0]) is tap.features[0]
    assert tap.original(tap.features[1]) is features[1]
    with pytest.raises(ValueError, match=r"student_features\[0\] was changed in place"):
        distil(ops, scene, features, tap)

    features = [f * 1 for f in scene.student_features]
    tap = ops.tap_features(features)
    total = distil(ops, scene, features, tap, feature_gate="foreground").feature + tap.features[0].sum()
    features[0].relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_bad_arguments(host):
    scene = make_scene(156).to(torch.float32)
    features = scene.student_features
    tap = ops.tap_features(features)
    with pytest.raises(ValueError, match=r"student_features\[0\] is none of the features"):
        distil(ops, scene, tap.features, tap)
    with pytest.raises(TypeError, match="features must be a list"):
        ops.tap_features(features[0])
    with pytest.raises(ValueError, match=r"features\[0\] must have shape"):
        ops.tap_features([features[0][0]])
    with pytest.raises(ValueError, match="losses must be in"):
        ops.tap_features(features, losses=0)
    with pytest.raises(TypeError, match="tap must be"):
        distil(ops, scene, features, tap.features)


def test_without_gradients_nothing_stands_between(host):
    scene = make_scene(156).to(torch.float32)
    with torch.no_grad():
        tap = ops.tap_features(scene.student_features)
        distil(ops, scene, scene.student_features, tap)
    assert all(one is other for one, other in zip(tap.features, scene.student_features))


def test_compiled(cpu):
    scene = make_scene(157).to(torch.float32)
    features, weights = scene.student_features, weights_of(scene.student_features)

    def step(*features):
        tap = ops.tap_features(features)
        losses = distil(ops, scene, list(features), tap)
        return total_of(losses) + sum((f * w).sum() for f, w in zip(tap.features, weights))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(step(*features), features)
    for one, other in zip(torch.autograd.grad(compiled(*features), features), expected):
        assert_tensors_close(one, other.double(), torch.float32)


@pytest.mark.parametrize("runs", [True, False])
def test_nothing_is_held_afterwards(host, runs):
    """A graph that held itself would keep two pyramids a step, whether it was run or not."""
    gc.collect()
    gc.disable()
    try:
        scene = make_scene(158).to(torch.float32)
        features = [f * 1 for f in scene.student_features]
        logits = scene.student_logits + features[0].sum()
        scene.student_logits = logits
        tap = ops.tap_features(features)
        scene.student_deltas = scene.student_deltas + tap.features[0].sum()
        total = total_of(distil(ops, scene, features, tap)) + tap.features[0].sum()
        held = [weakref.ref(tensor.untyped_storage()) for tensor in (*features, *scene.teacher_features)]
        nodes = [weakref.ref(tap.features[0].grad_fn), *map(weakref.ref, features)]
        if runs:
            total.backward()
        del tap, total, features, scene, logits
        assert not any(node() is not None for node in nodes), held
    finally:
        gc.enable()
