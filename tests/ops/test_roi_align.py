"""multiscale_roi_align and shared_roi_align against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_tensors_close

from tardkd.ops import reference

from .scenes import GEOMETRIES, LAYOUTS, LEVEL_RULE, make_scene
from .test_region_loss import DTYPES


def upstream_like(pooled):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(pooled.shape, generator=generator, dtype=torch.float64).to(pooled.device, pooled.dtype)


def assert_roi_align_matches(ops, features, proposals, **options):
    """``features`` require grad, in the dtype and layout under test."""
    wide = [f.detach().double().requires_grad_() for f in features]
    expected = reference.multiscale_roi_align(wide, proposals, **options)
    actual = ops.multiscale_roi_align(features, proposals, **options)
    assert_tensors_close(actual, expected, features[0].dtype, "pooled")
    upstream = upstream_like(actual)
    gradients = torch.autograd.grad(actual, features, upstream)
    for level, target in enumerate(torch.autograd.grad(expected, wide, upstream.double())):
        assert_tensors_close(gradients[level], target, features[0].dtype, f"gradient of features[{level}]")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", ["equal", "single"])
def test_dtypes_and_layouts(backend, dtype, layout, geometry):
    scene = make_scene(31, geometry=geometry).to(dtype, None, layout, device=backend.device)
    options = dict(scales=scene.student_scales, **LEVEL_RULE)
    assert_roi_align_matches(backend.ops, scene.student_features, scene.proposals, **options)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("channels", [1, 4, 9, 33, 64])
def test_channels(kernel, channels, layout):
    scene = make_scene(32, channels=channels).to(torch.float32, None, layout, device=kernel.device)
    options = dict(scales=scene.student_scales, **LEVEL_RULE)
    assert_roi_align_matches(kernel.ops, scene.student_features, scene.proposals, **options)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("output_size", [1, 7, (3, 5)], ids=str)
@pytest.mark.parametrize("aligned", [False, True], ids=["legacy", "aligned"])
@pytest.mark.parametrize("sampling_ratio", [-1, 0, 1, 2, 4])
def test_sampling(kernel, sampling_ratio, aligned, output_size, layout):
    scene = make_scene(33, regions=24).to(torch.float32, None, layout, device=kernel.device)
    options = dict(sampling_ratio=sampling_ratio, aligned=aligned, output_size=output_size)
    assert_roi_align_matches(
        kernel.ops,
        scene.student_features,
        scene.proposals,
        scales=scene.student_scales,
        **LEVEL_RULE,
        **options,
    )


@pytest.mark.parametrize("canonical_scale", [8, 56, 224])
@pytest.mark.parametrize("canonical_level", [0, 3, 5])
def test_level_rule(kernel, canonical_scale, canonical_level):
    scene = make_scene(34).to(torch.float64, device=kernel.device)
    options = dict(canonical_scale=canonical_scale, canonical_level=canonical_level)
    assert_roi_align_matches(
        kernel.ops, scene.student_features, scene.proposals, scales=scene.student_scales, **options
    )


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_shared(kernel, geometry, dtypes):
    scene = make_scene(35, geometry=geometry).to(*DTYPES[dtypes], device=kernel.device)
    wide = scene.doubled()
    options = dict(**scene.scales, **LEVEL_RULE, output_size=(5, 3), aligned=True)
    actual = kernel.ops.shared_roi_align(scene.student_features, scene.teacher_features, scene.proposals, **options)
    expected = reference.shared_roi_align(wide.student_features, wide.teacher_features, wide.proposals, **options)
    for name, got, want, dtype in zip(("student", "teacher"), actual, expected, DTYPES[dtypes]):
        assert_tensors_close(got, want, dtype, f"{name} pooled")
    assert not actual[1].requires_grad
    upstream = upstream_like(actual[0])
    gradients = torch.autograd.grad(actual[0], scene.student_features, upstream)
    targets = torch.autograd.grad(expected[0], wide.student_features, upstream.double())
    for level, (gradient, target) in enumerate(zip(gradients, targets)):
        assert_tensors_close(gradient, target, DTYPES[dtypes][0], f"gradient of student_features[{level}]")


def test_proposals_as_a_list(kernel):
    scene = make_scene(36, images=3).to(torch.float32, device=kernel.device)
    listed = [scene.proposals[scene.proposals[:, 0] == n, 1:] for n in range(3)]
    listed[1] = listed[1][:0]
    flat = torch.cat([torch.cat([boxes.new_full((len(boxes), 1), n), boxes], 1) for n, boxes in enumerate(listed)])
    options = dict(scales=scene.student_scales, **LEVEL_RULE)
    expected = kernel.ops.multiscale_roi_align(scene.student_features, flat, **options)
    assert torch.equal(kernel.ops.multiscale_roi_align(scene.student_features, listed, **options), expected)


def test_one_output_alone_has_a_gradient(kernel):
    """Only some of the upstream gradient may be nonzero, or laid out oddly."""
    scene = make_scene(37).to(torch.float64, device=kernel.device)
    options = dict(scales=scene.student_scales, **LEVEL_RULE)
    wide = scene.doubled()
    actual = kernel.ops.multiscale_roi_align(scene.student_features, scene.proposals, **options)
    expected = reference.multiscale_roi_align(wide.student_features, wide.proposals, **options)
    for upstream in (
        torch.zeros_like(actual).index_fill_(0, torch.tensor([3], device=actual.device), 1.0),
        actual.new_ones(()).expand_as(actual),
        upstream_like(actual).permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    ):
        gradients = torch.autograd.grad(actual, scene.student_features, upstream, retain_graph=True)
        targets = torch.autograd.grad(expected, wide.student_features, upstream, retain_graph=True)
        for gradient, target in zip(gradients, targets):
            assert_tensors_close(gradient, target, torch.float64)


def test_boxes_narrower_than_rounding_errors(kernel):
    """Neighbouring samples of such a box may come out in descending order, on either side of a pixel."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(1, 4, 40, 40, generator=generator, dtype=torch.float64).to(kernel.device).requires_grad_()]
    ulp = 2.0**-46  # of numbers from 64 to 128
    steps = ulp * torch.arange(7, dtype=torch.float64)
    pixel, before, size = torch.cartesian_prod(torch.tensor([18.0, 19.0]).double(), -steps, steps).T
    corner = 4 * pixel + 2 + before  # `pixel` on the map, nearly
    proposals = torch.stack([0 * pixel, corner, corner, corner + size, corner + size], 1).to(kernel.device)
    options = dict(scales=[0.25], aligned=True, output_size=4, sampling_ratio=11)
    assert_roi_align_matches(kernel.ops, features, proposals, **options)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("output_size", [1, 7, (3, 16)], ids=str)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_deterministic_algorithms(kernel, deterministic, sampling_ratio, output_size, layout):
    scene = make_scene(35, regions=300, channels=9).to(torch.float32, None, layout, device=kernel.device)
    options = dict(scales=scene.student_scales, **LEVEL_RULE, sampling_ratio=sampling_ratio, output_size=output_size)
    assert_roi_align_matches(kernel.ops, scene.student_features, scene.proposals, **options)


def test_more_regions_than_a_kernel_looks_at_in_a_turn(kernel):
    scene = make_scene(36, regions=1100, channels=3).to(torch.float32, device=kernel.device)
    options = dict(scales=scene.student_scales, **LEVEL_RULE, sampling_ratio=2, output_size=2)
    assert_roi_align_matches(kernel.ops, scene.student_features, scene.proposals, **options)
