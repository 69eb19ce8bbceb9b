"""Features whose channels are standardised before they are compared."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_tensors_close, assert_values_close

import tardkd.ops
from tardkd.ops import reference

from .parity import TERMS, assert_losses_match, losses_and_gradients
from .scenes import GEOMETRIES, LAYOUTS, LEVEL_RULE, make_scene
from .test_channels import WIDTHS, make_widths
from .test_levels import OPEN, random_levels
from .test_pooled_loss import SLICES, make_pooled
from .test_region_loss import DTYPES

NORM = dict(feature_norm="channel")


def scaled(scene, seed=5):
    """Either side with a scale and an offset of its own for every channel, as unlike models have them."""
    generator = torch.Generator().manual_seed(seed)

    def change(feature):
        scale, offset = torch.randn(2, 1, feature.shape[1], 1, 1, generator=generator, dtype=torch.float64)
        return feature * scale.exp() + 5 * offset

    sides = scene.student_features, scene.teacher_features
    student, teacher = ([change(feature) for feature in features] for features in sides)
    return scene.replace(student_features=student, teacher_features=teacher)


@pytest.mark.parametrize("geometry", [name for name in GEOMETRIES if name != "eight"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes_layouts_and_geometries(backend, dtypes, layout, geometry):
    scene = make_scene(341, geometry=geometry).to(*DTYPES[dtypes], layout, layout, device=backend.device)
    assert_losses_match(backend.ops, scene, feature_gate="all", **NORM)


@pytest.mark.parametrize("layouts", [("nchw", "channels_last"), ("channels_last", "sliced")], ids="-".join)
@pytest.mark.parametrize("geometry", ["equal", "resolution"])
def test_the_sides_may_differ_in_layout(kernel, geometry, layouts):
    scene = make_scene(342, geometry=geometry).to(torch.float32, None, *layouts, device=kernel.device)
    assert_losses_match(kernel.ops, scene, **NORM)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("channels", [1, 7, 8, 16, 31, 64, 100])
def test_channels(kernel, channels, layout):
    scene = make_scene(343, channels=channels).to(torch.float32, None, layout, layout, device=kernel.device)
    assert_losses_match(kernel.ops, scene, **NORM)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("widths", WIDTHS)
def test_channels_that_differ_from_level_to_level(kernel, widths, layout):
    scene = make_widths(344, WIDTHS[widths]).to(torch.float32, None, layout, layout, device=kernel.device)
    levels, _ = random_levels(scene)
    assert_losses_match(kernel.ops, scene, **OPEN, **NORM)
    assert_losses_match(kernel.ops, scene, **OPEN, **NORM, student_levels=levels, teacher_levels=levels)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bin_weight", ["uniform", "gaussian"])
@pytest.mark.parametrize("feature_loss", ["squared", "absolute", "smooth_l1"])
def test_losses(kernel, feature_loss, bin_weight, reduction):
    scene = make_scene(345).to(torch.float32, device=kernel.device)
    options = dict(feature_loss=feature_loss, bin_weight=bin_weight, reduction=reduction, feature_gate="all", **NORM)
    assert_losses_match(kernel.ops, scene, region_weights=scene.region_weights, **options)
    pooled = make_pooled(scene)
    assert_losses_match(kernel.ops, scene, pooled=pooled, region_weights=scene.region_weights, **options)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("output_size", [1, (3, 5), (14, 2)], ids=str)
def test_sampling(kernel, sampling_ratio, output_size):
    scene = make_scene(346, geometry="resolution", regions=24).to(torch.float32, device=kernel.device)
    options = dict(sampling_ratio=sampling_ratio, output_size=output_size, feature_gate="all")
    assert_losses_match(kernel.ops, scene, **options, **NORM)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtypes", ["float64", "float32", "bfloat16"])
def test_deterministic_algorithms(kernel, deterministic, dtypes, layout, reduction):
    """Where it takes other kernels to make the same gradients."""
    scene = make_scene(347, regions=60, channels=35).to(*DTYPES[dtypes], layout, layout, device=kernel.device)
    assert_losses_match(kernel.ops, scene, reduction=reduction, **NORM)


# --- pooled features ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature_gate", ["either", "all"])
@pytest.mark.parametrize("layout", SLICES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_pooled_dtypes_and_layouts(backend, dtypes, layout, feature_gate):
    scene = make_scene(348).to(*DTYPES[dtypes], device=backend.device)
    pooled = make_pooled(scene, *DTYPES[dtypes], layout)
    assert_losses_match(backend.ops, scene, pooled=pooled, feature_gate=feature_gate, **NORM)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("channels", [1, 3, 8, 17, 64])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (3, 5)], ids=str)
def test_pooled_shapes(kernel, size, channels, layout):
    scene = make_scene(349).to(torch.float32, device=kernel.device)
    pooled = make_pooled(scene, size=size, channels=channels, layout=layout)
    assert_losses_match(kernel.ops, scene, pooled=pooled, bin_weight="gaussian", **NORM)


# --- what it means --------------------------------------------------------------------------------------------------


def test_standardised_maps_give_the_same_without_the_option(backend):
    scene = make_scene(350, geometry="strides").to(torch.float64, device=backend.device)
    losses, gradients = losses_and_gradients(backend.ops, scene, **NORM)
    plain = scene.replace(
        student_features=reference.standardised(scene.student_features),
        teacher_features=reference.standardised(scene.teacher_features),
    )
    expected = tardkd.ops.region_distill_loss(*plain.inputs, **plain.scales, **LEVEL_RULE)
    assert_values_close(losses.feature, expected.feature, torch.float64)
    targets = torch.autograd.grad(0.7 * expected.feature, scene.student_features)
    for gradient, target in zip(gradients, targets):
        assert_tensors_close(gradient, target, torch.float64)


def test_scales_and_offsets_of_channels_mean_nothing(backend):
    scene = make_scene(351)
    plain, changed = (s.to(torch.float64, device=backend.device) for s in (scene, scaled(scene)))
    expected, actual = (losses_and_gradients(backend.ops, s, **NORM, **OPEN)[0].feature for s in (plain, changed))
    raw = losses_and_gradients(backend.ops, changed, **OPEN)[0].feature
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)  # but for the 1e-6 beside small variances
    assert raw > 10 * actual


def test_large_offsets_leave_the_precision(kernel):
    """Channels whose mean is 1000 times their deviation."""
    scene = make_scene(352)
    moved = scene.replace(student_features=[feature + 1000 for feature in scene.student_features])
    losses, expected = (
        losses_and_gradients(ops, s, **NORM, **OPEN)[0]
        for ops, s in (
            (kernel.ops, moved.to(torch.float32, device=kernel.device)),
            (reference, moved.to(torch.float32, device=kernel.device).doubled()),
        )
    )
    torch.testing.assert_close(losses.feature.double(), expected.feature, rtol=1e-3, atol=0)


def test_equal_patterns_cost_nothing_and_opposite_ones_four(backend):
    """The mean of (x - y)^2 is 2 (1 - r): 0 for a correlation of 1 and 4 for one of -1."""
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(2, 3, 12, 12, generator=generator, dtype=torch.float64).to(backend.device)
    scene = make_scene(353).to(torch.float64, device=backend.device)
    boxes = torch.cartesian_prod(torch.arange(2.0), torch.tensor([0.0]))
    proposals = torch.cat([boxes, torch.full((2, 1), 0.0), torch.full((2, 2), 12.0)], 1).to(backend.device)
    heads = [tensor[:2] for tensor in scene.per_region[1:]]
    options = dict(student_scales=[1.0], feature_gate="all", output_size=12, sampling_ratio=1, aligned=True, **NORM)
    for factor, expected in ((2.5, 0.0), (-2.5, 4.0)):
        student = [(factor * feature + 7).requires_grad_()]
        losses = backend.ops.region_distill_loss(student, [feature], proposals, *heads, **options)
        assert losses.feature.item() == pytest.approx(expected, abs=1e-4)


def test_the_gradient_moves_neither_the_mean_nor_the_deviation(backend):
    """The loss is the same for any of them, so that no channel is pushed to shrink or to drift."""
    scene = make_scene(354).to(torch.float64, device=backend.device)
    for features in (scene.student_features, [make_pooled(scene, torch.float64, torch.float64)[0]]):
        if features is scene.student_features:
            _, (*gradients, _, _) = losses_and_gradients(backend.ops, scene, **NORM, **OPEN)
        else:
            pooled = features[0], torch.randn_like(features[0])
            _, (*gradients, _, _) = losses_and_gradients(backend.ops, scene, pooled=pooled, **NORM, **OPEN)
        for feature, gradient in zip(features, gradients):
            [standard] = reference.standardised([feature.detach()])
            size = gradient.abs().sum((0, 2, 3))
            assert size.all()
            assert (gradient.sum((0, 2, 3)).abs() < 1e-10 * size).all()
            assert ((gradient * standard).sum((0, 2, 3)).abs() < 1e-5 * size).all()  # but for the 1e-6 in the deviation


def test_a_step_along_the_gradient_lowers_the_loss(backend):
    scene = make_scene(355).to(torch.float64, device=backend.device)
    before, gradients = losses_and_gradients(backend.ops, scene, **NORM, **OPEN)
    for feature, gradient in zip(scene.student_features, gradients):
        feature.data -= gradient
    after, _ = losses_and_gradients(backend.ops, scene, **NORM, **OPEN)
    assert after.feature < before.feature


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_channels_are_zero(backend, value):
    """Those of float32 are so up to what pooling rounds, a thousand times: the deviation is 0.001."""
    dtype = torch.float64 if value else torch.float32
    scene = make_scene(356).to(dtype, device=backend.device)
    for feature in scene.student_features:
        feature.data[:, 2] = value
    assert_losses_match(backend.ops, scene, **NORM, **OPEN)


def test_two_pixels_have_but_one_pattern(backend):
    """Standardised they are 1 and -1 whatever they were: no gradient."""
    scene = make_scene(366).to(torch.float64, device=backend.device)
    pair = torch.tensor([3.0, -5.0], dtype=torch.float64, device=backend.device).reshape(2, 1, 1, 1).requires_grad_()
    options = dict(student_scales=[1 / 128], feature_gate="all", output_size=1, **NORM)
    losses = backend.ops.region_distill_loss([pair], [-pair.detach()], *scene.per_region, **options)
    (gradient,) = torch.autograd.grad(losses.feature, pair)
    assert losses.feature > 0 and gradient.abs().max() < 1e-6


# --- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_regions(backend, reduction):
    scene = make_scene(357, regions=4).rows(slice(0, 0)).to(torch.float32, device=backend.device)
    pooled = make_pooled(scene)
    for options in ({}, {"pooled": pooled}):
        losses, gradients = losses_and_gradients(backend.ops, scene, reduction=reduction, **options, **NORM)
        assert not losses.feature.any() and not any(gradient.any() for gradient in gradients)


def test_no_images(backend):
    scene = make_scene(358, regions=2).rows(slice(0, 0)).to(torch.float32, device=backend.device)
    scene.student_features = [feature.detach()[:0].requires_grad_() for feature in scene.student_features]
    scene.teacher_features = [feature[:0] for feature in scene.teacher_features]
    losses, _ = losses_and_gradients(backend.ops, scene.replace(proposals=[]), **NORM)
    assert not losses.feature.any()


def test_closed_gates_leave_no_gradient(backend):
    scene = make_scene(359).to(torch.float32, device=backend.device)
    scene.labels = torch.zeros_like(scene.labels)
    losses, gradients = losses_and_gradients(backend.ops, scene, **NORM)
    assert not losses.feature.any() and not any(gradient.any() for gradient in gradients)


def test_the_heads_terms_do_not_change(backend):
    scene = make_scene(360).to(torch.float32, device=backend.device)
    expected, actual = (losses_and_gradients(backend.ops, scene, **options)[0] for options in ({}, NORM))
    for name in (*TERMS[1:], "gates", "scores"):
        assert torch.equal(getattr(actual, name), getattr(expected, name))


def test_an_unknown_norm_is_refused(backend):
    scene = make_scene(361).to(torch.float32, device=backend.device)
    with pytest.raises(ValueError, match="feature_norm must be one of none, channel; got 'layer'"):
        backend.ops.region_distill_loss(*scene.inputs, **scene.scales, feature_norm="layer")


# --- dispatcher, compiler, launches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_results_have_the_strides_of_real_ones(host, layout):
    scene = make_scene(362).to(torch.float32, None, layout)
    features = [feature.detach() for feature in scene.student_features]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.tardkd.channel_norms, (features,), test_utils=tests)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole(host, deterministic, reduction):
    scene = make_scene(363, geometry="strides").to(torch.float32)
    pooled = make_pooled(scene)

    def step(student_features, teacher_features, student_pooled, teacher_pooled, *per_region):
        options = dict(reduction=reduction, **NORM)
        fused = host.ops.region_distill_loss(
            student_features, teacher_features, *per_region, **scene.scales, **LEVEL_RULE, **options
        )
        beside = host.ops.pooled_distill_loss(student_pooled, teacher_pooled, *per_region, **options)
        return fused.feature.square().sum() + beside.feature.square().sum()

    arguments = (scene.student_features, scene.teacher_features, *pooled, *scene.per_region)
    leaves = [*scene.student_features, pooled[0]]
    expected = step(*arguments)
    torch._dynamo.reset()
    actual = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)(*arguments)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(total, leaves) for total in (actual, expected))
    for gradient, target in zip(*gradients):
        torch.testing.assert_close(gradient, target)


def test_threads_change_no_bit(cpu):
    scene = make_scene(364, channels=20).to(torch.float32)
    expected = losses_and_gradients(cpu.ops, scene, **NORM)
    torch.set_num_threads(3)
    actual = losses_and_gradients(cpu.ops, scene, **NORM)
    torch.set_num_threads(1)
    for got, want in zip((*actual[0], *actual[1]), (*expected[0], *expected[1])):
        assert torch.equal(got, want)


def test_no_more_launches(cuda_on_cpu):
    scene = make_scene(365).to(torch.float32)
    losses_and_gradients(tardkd.ops, scene, **NORM)
    assert len(cuda_on_cpu.launches()) == 4  # of the loss, of the scaling of its gradients, of those of pixels
