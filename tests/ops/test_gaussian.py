"""gaussian_feature_loss against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_tensors_close, assert_values_close

from tardkd.ops import reference

from .scenes import LAYOUTS, make_boxes, make_scene
from .test_region_loss import DTYPES


def make_gt(counts=(3, 5), device="cpu", dtype=torch.float32):
    """One (G_n, 4) tensor per image, awkward boxes included."""
    generator = torch.Generator().manual_seed(sum(counts))
    return [make_boxes(generator, count).to(device, dtype) for count in counts]


def assert_gaussian_matches(ops, scene, gt_boxes, **options):
    wide = scene.doubled()
    scales = scene.student_scales
    actual = ops.gaussian_feature_loss(
        scene.student_features, scene.teacher_features, gt_boxes, scales=scales, **options
    )
    expected = reference.gaussian_feature_loss(
        wide.student_features, wide.teacher_features, gt_boxes, scales=scales, **options
    )
    dtype = scene.student_features[0].dtype
    assert actual.shape == () and actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_values_close(actual, expected, dtype, "loss")
    gradients = torch.autograd.grad(3 * actual, scene.student_features)
    targets = torch.autograd.grad(3 * expected, wide.student_features)
    for level, (gradient, target) in enumerate(zip(gradients, targets)):
        assert_tensors_close(gradient, target, dtype, f"gradient of student_features[{level}]")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes_and_layouts(backend, dtypes, layout):
    scene = make_scene(41).to(*DTYPES[dtypes], layout, layout, device=backend.device)
    assert_gaussian_matches(backend.ops, scene, make_gt(device=backend.device))


@pytest.mark.parametrize(
    "layouts", [("nchw", "channels_last"), ("channels_last", "sliced"), ("sliced", "nchw")], ids="-".join
)
def test_the_sides_may_differ_in_layout(kernel, layouts):
    scene = make_scene(42).to(torch.float32, None, *layouts, device=kernel.device)
    assert_gaussian_matches(kernel.ops, scene, make_gt(device=kernel.device))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("channels", [1, 3, 8, 33])
def test_channels(kernel, channels, layout):
    scene = make_scene(43, channels=channels).to(torch.float32, None, layout, layout, device=kernel.device)
    assert_gaussian_matches(kernel.ops, scene, make_gt(device=kernel.device))


@pytest.mark.parametrize("sigma_squared", [0.1, 1.0, 2.0, 50.0])
@pytest.mark.parametrize("counts", [(1, 0), (0, 20), (7, 7), (40, 1)], ids=str)
def test_boxes(kernel, counts, sigma_squared):
    scene = make_scene(44).to(torch.float64, device=kernel.device)
    assert_gaussian_matches(kernel.ops, scene, make_gt(counts, kernel.device), sigma_squared=sigma_squared)


def test_float64_boxes_keep_their_precision(kernel):
    scene = make_scene(45).to(torch.float64, device=kernel.device)
    gt_boxes = [boxes + torch.pi * 1e-3 for boxes in make_gt(device=kernel.device, dtype=torch.float64)]
    assert_gaussian_matches(kernel.ops, scene, gt_boxes)


def test_single_level_and_single_image(kernel):
    scene = make_scene(46, images=1).to(torch.float32, device=kernel.device)
    scene = scene.replace(
        student_features=scene.student_features[1:2],
        teacher_features=scene.teacher_features[1:2],
        student_scales=scene.student_scales[1:2],
    )
    assert_gaussian_matches(kernel.ops, scene, make_gt((4,), kernel.device))


def test_by_hand(backend):
    """One box of 4 x 2 map pixels around (2, 1): three rows of five pixels, of which the centre weighs 1."""
    student = torch.zeros(1, 2, 4, 6, device=backend.device, requires_grad=True)
    teacher = torch.ones(1, 2, 4, 6, device=backend.device)
    gt_boxes = [torch.tensor([[0.0, 0.0, 8.0, 4.0]], device=backend.device)]
    loss = backend.ops.gaussian_feature_loss([student], [teacher], gt_boxes, scales=[0.5])
    x, y = torch.arange(6.0), torch.arange(4.0)
    column = torch.exp(-((x - 2) ** 2) / (2 * 2.0**2)) * (x <= 4)
    row = torch.exp(-((y - 1) ** 2) / (2 * 1.0**2)) * (y <= 2)
    mask = row[:, None] * column
    expected = 2 * mask.sum() / (2 * mask.sum())  # two channels of difference one
    assert_values_close(loss, expected, torch.float32)
    (gradient,) = torch.autograd.grad(loss, student)
    assert_tensors_close(gradient, (-mask / mask.sum()).expand(1, 2, 4, 6), torch.float32)


def test_overlap_takes_the_maximum(backend):
    scene = make_scene(47, images=1).to(torch.float64, device=backend.device)
    box = torch.tensor([[20.0, 10.0, 90.0, 70.0]], device=backend.device)
    options = dict(scales=scene.student_scales)
    once, twice = (
        backend.ops.gaussian_feature_loss(scene.student_features, scene.teacher_features, [boxes], **options)
        for boxes in (box, box.repeat(2, 1))
    )
    assert torch.equal(once, twice)


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_boxes_that_are_no_boxes_are_left_out(backend, fault):
    scene = make_scene(48, images=1).to(torch.float64, device=backend.device)
    good = torch.tensor([[20.0, 10.0, 90.0, 70.0]], device=backend.device)
    bad = torch.tensor(
        [[0.0, 0.0, fault, 50.0], [30.0, 30.0, 30.0, 60.0], [50.0, 20.0, 40.0, 60.0], [fault] * 4],
        device=backend.device,
    )
    options = dict(scales=scene.student_scales)
    expected, actual = (
        backend.ops.gaussian_feature_loss(scene.student_features, scene.teacher_features, [boxes], **options)
        for boxes in (good, torch.cat([bad, good]))
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("counts", [(0, 0), (1, 0)], ids=str)
def test_without_boxes_the_loss_is_a_connected_zero(backend, counts):
    scene = make_scene(49).to(torch.float32, device=backend.device)
    gt_boxes = [torch.full((count, 4), -500.0, device=backend.device) for count in counts]
    loss = backend.ops.gaussian_feature_loss(
        scene.student_features, scene.teacher_features, gt_boxes, scales=scene.student_scales
    )
    assert loss.item() == 0
    for feature, gradient in zip(scene.student_features, torch.autograd.grad(loss, scene.student_features)):
        assert gradient.shape == feature.shape and not gradient.any()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_outside_every_box_stays_there(backend, side):
    scene = make_scene(50, images=1).to(torch.float32, device=backend.device)
    for feature in getattr(scene, f"{side}_features"):
        feature.data[..., feature.shape[3] // 2 + 1 :] = float("nan")
    gt_boxes = [torch.tensor([[5.0, 5.0, 70.0, 90.0]], device=backend.device)]
    loss = backend.ops.gaussian_feature_loss(
        scene.student_features, scene.teacher_features, gt_boxes, scales=scene.student_scales
    )
    assert loss.isfinite() and loss > 0
    for gradient in torch.autograd.grad(loss, scene.student_features):
        assert gradient.isfinite().all()
        assert not gradient[..., gradient.shape[3] // 2 + 1 :].any()
