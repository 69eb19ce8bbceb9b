"""Pyramids whose channels differ from level to level."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_values_close

import tardkd.ops

from .parity import TERMS, assert_losses_match, losses_and_gradients
from .scenes import LAYOUTS, LEVEL_RULE, make_scene
from .test_gaussian import assert_gaussian_matches, make_gt
from .test_levels import OPEN, random_levels, rule_of
from .test_region_loss import DTYPES

# Below, at and beside the width of a vector, and more than a block takes; one side's level for the other's.
WIDTHS = {"few": (1, 7, 2, 5), "vectors": (16, 48, 32, 16), "many": (5, 100, 33, 8), "sorted": (8, 16, 32, 64)}
GEOMETRIES = ("equal", "resolution", "repeated")  # with as many levels on both sides


def make_widths(seed, widths, geometry="equal", **options):
    """A scene of which level l has ``widths[l]`` channels on both sides."""
    scene = make_scene(seed, channels=max(widths), geometry=geometry, **options)
    sides = scene.student_features, scene.teacher_features
    student, teacher = ([f[:, :c].contiguous() for f, c in zip(features, widths)] for features in sides)
    return scene.replace(student_features=student, teacher_features=teacher)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_dtypes_layouts_and_geometries(backend, geometry, dtypes, layout):
    scene = make_widths(321, WIDTHS["few"], geometry).to(*DTYPES[dtypes], layout, layout, device=backend.device)
    assert_losses_match(backend.ops, scene, feature_gate="all")


@pytest.mark.parametrize("layouts", [("nchw",) * 2, ("channels_last",) * 2, ("nchw", "channels_last")], ids="-".join)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("widths", WIDTHS)
def test_widths(kernel, widths, reduction, layouts):
    scene = make_widths(322, WIDTHS[widths], regions=48).to(torch.float32, None, *layouts, device=kernel.device)
    options = dict(region_weights=scene.region_weights, bin_weight="gaussian", feature_loss="smooth_l1")
    assert_losses_match(kernel.ops, scene, reduction=reduction, feature_gate="all", **options)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_each_region_counts_by_the_channels_of_its_own_level(backend, geometry):
    """A call for each level, of the regions that belong to it, says the same."""
    scene = make_widths(323, WIDTHS["few"], geometry, regions=48).to(torch.float64, device=backend.device)
    losses, _ = losses_and_gradients(backend.ops, scene, reduction="none", **OPEN)
    levels = rule_of(scene, scene.student_scales)
    seen = 0
    for level in levels.unique().tolist():
        rows = levels == level
        part = scene.rows(rows).replace(
            student_features=scene.student_features[level : level + 1],
            teacher_features=scene.teacher_features[level : level + 1],
            student_scales=scene.student_scales[level : level + 1],
            teacher_scales=scene.teacher_scales[level : level + 1],
        )
        alone = backend.ops.region_distill_loss(*part.inputs, **part.scales, **LEVEL_RULE, reduction="none", **OPEN)
        for term in TERMS:
            assert_values_close(getattr(losses, term)[rows], getattr(alone, term), torch.float64, term)
        seen += len(alone.feature)
    assert seen == len(scene.labels) and len(levels.unique()) > 1


@pytest.mark.parametrize("same", [True, False], ids=["one tensor", "two"])
def test_given_levels(kernel, same):
    """The levels of a region may differ where their channels are equal; where they are not, it is left out."""
    scene = make_widths(324, (6, 3, 6, 9), regions=48).to(torch.float32, device=kernel.device)
    student, other = random_levels(scene)
    teacher = student if same else other
    given = dict(student_levels=student, teacher_levels=teacher)
    assert_losses_match(kernel.ops, scene, **OPEN, **given)
    widths = torch.tensor([6, 3, 6, 9], device=kernel.device)
    fits = widths[student] == widths[teacher]
    losses, _ = losses_and_gradients(kernel.ops, scene, **OPEN, **given)
    assert torch.equal(losses.gates[:, 0], fits) and (fits & (student != teacher)).any() != same


def test_checked_values(backend, monkeypatch):
    monkeypatch.setenv("TARDKD_CHECK", "1")
    scene = make_widths(325, (6, 3, 6, 9)).to(torch.float32, device=backend.device)
    scene.labels = torch.zeros_like(scene.labels)  # of background no object is looked at
    student = torch.zeros_like(scene.labels)
    teacher = student.clone()
    teacher[5] = 2
    options = dict(**scene.scales, student_levels=student)
    backend.ops.region_distill_loss(*scene.inputs, **options, teacher_levels=teacher)
    teacher[9] = 3
    with pytest.raises(ValueError, match=r"region 9: .*student_levels and teacher_levels .*channels: \[0, 3\]"):
        backend.ops.region_distill_loss(*scene.inputs, **options, teacher_levels=teacher)


def test_deterministic_algorithms(kernel, deterministic):
    """Where it takes other kernels to make the same gradients."""
    scene = make_widths(326, WIDTHS["many"], regions=60).to(torch.float32, device=kernel.device)
    assert_losses_match(kernel.ops, scene, feature_gate="all")


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_gaussian_loss(backend, dtypes, layout):
    scene = make_widths(327, WIDTHS["many"]).to(*DTYPES[dtypes], layout, layout, device=backend.device)
    assert_gaussian_matches(backend.ops, scene, make_gt(device=backend.device))


def test_compiles_whole(host, deterministic):
    scene = make_widths(328, WIDTHS["few"]).to(torch.float32)

    def step(*inputs):
        return sum(host.ops.region_distill_loss(*inputs, **scene.scales, **LEVEL_RULE)[:3])

    expected = step(*scene.inputs)
    torch._dynamo.reset()
    actual = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)(*scene.inputs)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(total, scene.leaves) for total in (actual, expected))
    for gradient, target in zip(*gradients):
        torch.testing.assert_close(gradient, target)


def test_no_more_launches(cuda_on_cpu):
    losses_and_gradients(tardkd.ops, make_widths(329, WIDTHS["few"]).to(torch.float32))
    assert len(cuda_on_cpu.launches()) == 4  # of the loss, of the scaling of its gradients, of those of pixels


# --- misfits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        (
            (5, 6, 7),
            (5, 6, 8),
            r"student_features\[2\] has 7 channels but teacher_features\[2\] has 8, .*1x1 convolution",
        ),
        (
            (5, 5, 5),
            (5, 6, 5),
            r"student_features\[1\] has 5 channels but teacher_features\[1\] has 6, .*1x1 convolution",
        ),
        ((5, 6, 7), (5, 6), r"student_features have 3 levels but teacher_features have 2; .*1x1 convolution"),
    ],
    ids=str,
)
def test_sides_that_do_not_fit_are_refused(backend, student, teacher, message):
    scene = make_scene(330, channels=8).to(torch.float32, device=backend.device)
    scales = [1 / 4, 1 / 8, 1 / 16]
    scene = scene.replace(
        student_features=[f.detach()[:, :c] for f, c in zip(scene.student_features, student)],
        teacher_features=[f[:, :c] for f, c in zip(scene.teacher_features, teacher)],
        student_scales=scales[: len(student)],
        teacher_scales=scales[: len(teacher)],
    )
    with pytest.raises(ValueError, match=message):
        backend.ops.region_distill_loss(*scene.inputs, **scene.scales)


def test_the_levels_of_the_teacher_alone_are_refused(backend):
    scene = make_widths(331, WIDTHS["few"]).to(torch.float32, device=backend.device)
    with pytest.raises(ValueError, match="teacher_levels go with student_levels"):
        backend.ops.region_distill_loss(*scene.inputs, **scene.scales, teacher_levels=torch.zeros_like(scene.labels))


def test_one_tensor_cannot_hold_what_they_pool(backend):
    scene = make_widths(332, WIDTHS["few"]).to(torch.float32, device=backend.device)
    message = r"features\[1\] has 2 images and 7 channels but .*features\[0\] has 2 images and 1 channels"
    options = dict(scales=scene.student_scales)
    with pytest.raises(ValueError, match=message):
        backend.ops.multiscale_roi_align(scene.student_features, scene.proposals, **options)
    with pytest.raises(ValueError, match=message):
        backend.ops.shared_roi_align(scene.student_features, scene.teacher_features, scene.proposals, **scene.scales)
