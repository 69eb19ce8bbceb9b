"""pooled_distill_loss against the reference in float64, and against region_distill_loss."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_values_close

from .parity import TERMS, assert_losses_match
from .scenes import LEVEL_RULE, make_scene
from .test_region_loss import CLASSIFICATION_GATES, DTYPES, FEATURE_GATES, REGRESSION_GATES

SLICES = {
    "nchw": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
}


def make_pooled(scene, student=torch.float32, teacher=torch.float32, layout="nchw", size=(7, 7), channels=6):
    """(R, C, h, w) on both sides; the student's requires grad."""
    generator = torch.Generator().manual_seed(len(scene.labels))
    shape = (len(scene.labels), channels, *size)
    device = scene.labels.device
    sides = [torch.randn(shape, generator=generator).to(device, dtype) for dtype in (student, teacher)]
    pooled = [SLICES[layout](side) for side in sides]
    return pooled[0].requires_grad_(), pooled[1]


@pytest.mark.parametrize("layout", SLICES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes_and_layouts(backend, dtypes, layout):
    scene = make_scene(21).to(*DTYPES[dtypes], device=backend.device)
    assert_losses_match(backend.ops, scene, pooled=make_pooled(scene, *DTYPES[dtypes], layout))


@pytest.mark.parametrize("channels", [1, 3, 8, 17, 64])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (3, 5)], ids=str)
def test_shapes(kernel, channels, size):
    scene = make_scene(22).to(torch.float32, device=kernel.device)
    pooled = make_pooled(scene, size=size, channels=channels)
    assert_losses_match(kernel.ops, scene, pooled=pooled, bin_weight="gaussian")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_regions_than_threads_add_them_up(kernel, reduction):
    """The last block has 256 threads; 1300 regions are several turns for each, and not the same number for all."""
    scene = make_scene(29, regions=1300, classes=2).to(torch.float32, device=kernel.device)
    pooled = make_pooled(scene, size=(1, 1), channels=4)
    assert_losses_match(kernel.ops, scene, pooled=pooled, feature_gate="all", reduction=reduction)


@pytest.mark.parametrize("size", [(1, 5), (5, 1)], ids=str)
def test_the_stride_of_an_axis_of_one_bin_means_nothing(kernel, size):
    scene = make_scene(28).to(torch.float32, device=kernel.device)
    student, teacher = (
        side.detach().transpose(2, 3).contiguous().transpose(2, 3) for side in make_pooled(scene, size=size)
    )
    assert_losses_match(kernel.ops, scene, pooled=(student.requires_grad_(), teacher))


@pytest.mark.parametrize("regression_gate", REGRESSION_GATES)
@pytest.mark.parametrize("classification_gate", CLASSIFICATION_GATES)
@pytest.mark.parametrize("feature_gate", FEATURE_GATES)
def test_gates(kernel, feature_gate, classification_gate, regression_gate):
    scene = make_scene(23).to(torch.float32, device=kernel.device)
    gates = dict(feature_gate=feature_gate, classification_gate=classification_gate, regression_gate=regression_gate)
    assert_losses_match(kernel.ops, scene, pooled=make_pooled(scene), **gates)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bin_weight", ["uniform", "gaussian"])
@pytest.mark.parametrize("feature_loss", ["squared", "absolute", "smooth_l1"])
def test_losses(kernel, feature_loss, bin_weight, reduction, weighted):
    scene = make_scene(24).to(torch.float32, device=kernel.device)
    options = dict(feature_loss=feature_loss, bin_weight=bin_weight, reduction=reduction, feature_gate="all")
    if weighted:
        options["region_weights"] = scene.region_weights
    assert_losses_match(kernel.ops, scene, pooled=make_pooled(scene), **options)


@pytest.mark.parametrize("form", ["agnostic", "specific", "specific+background"])
@pytest.mark.parametrize("background", ["first", "last"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_heads(kernel, activation, background, form):
    scene = make_scene(25, activation=activation, background=background, student_deltas=form, teacher_deltas=form)
    scene = scene.to(torch.float64, device=kernel.device)
    pooled = make_pooled(scene, torch.float64, torch.float64)
    options = dict(activation=activation, background=background, temperature=2.0, beta=0.5)
    assert_losses_match(kernel.ops, scene, pooled=pooled, **options)


@pytest.mark.parametrize("bin_weight", ["uniform", "gaussian"])
@pytest.mark.parametrize("geometry", ["equal", "resolution"])
def test_agrees_with_the_pyramid_form(backend, geometry, bin_weight):
    scene = make_scene(26, geometry=geometry).to(torch.float32, device=backend.device)
    student, teacher = backend.ops.shared_roi_align(
        scene.student_features, scene.teacher_features, scene.proposals, **scene.scales, **LEVEL_RULE
    )
    pooled = backend.ops.pooled_distill_loss(student, teacher, *scene.per_region, bin_weight=bin_weight)
    fused = backend.ops.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE, bin_weight=bin_weight)
    assert torch.equal(pooled.gates, fused.gates)
    for term in (*TERMS, "scores"):
        assert_values_close(getattr(pooled, term), getattr(fused, term), torch.float32, term)
    gradients = torch.autograd.grad(pooled.feature, scene.student_features)
    expected = torch.autograd.grad(fused.feature, scene.student_features)
    for gradient, target in zip(gradients, expected):
        torch.testing.assert_close(gradient, target, rtol=1e-4, atol=1e-8)


def test_the_image_index_is_not_looked_at(backend):
    scene = make_scene(27).to(torch.float32, device=backend.device)
    pooled = make_pooled(scene)
    expected = backend.ops.pooled_distill_loss(*pooled, *scene.per_region)
    scene.proposals[::3, 0] = float("nan")
    scene.proposals[1::3, 0] = -7
    actual = backend.ops.pooled_distill_loss(*pooled, *scene.per_region)
    for got, want in zip(actual, expected):
        assert torch.equal(got, want)
