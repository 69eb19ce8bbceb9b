"""Regions that name the level of the pyramid that they are pooled from, in the place of the level rule."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_values_close

import tardkd.ops
from tardkd.ops import reference

from .parity import TERMS, assert_losses_match, losses_and_gradients
from .scenes import GEOMETRIES, LEVEL_RULE, make_scene
from .test_region_loss import DTYPES
from .test_roi_align import assert_roi_align_matches

OPEN = dict(feature_gate="all", classification_gate="all", regression_gate="foreground")


def random_levels(scene, seed=0, dtype=torch.int64):
    """One tensor for each side, (R,), all levels of either pyramid among them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = len(scene.student_features), len(scene.teacher_features)
    shape, device = scene.labels.shape, scene.labels.device
    return [torch.randint(levels, shape, generator=generator).to(device, dtype) for levels in sizes]


def rule_of(scene, scales):
    return reference.region_levels(scene.proposals[:, 1:], scales, *LEVEL_RULE.values())


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_region_loss(backend, geometry, dtypes, layout):
    scene = make_scene(301, geometry=geometry).to(*DTYPES[dtypes], layout, layout, device=backend.device)
    student, teacher = random_levels(scene)
    assert_losses_match(backend.ops, scene, student_levels=student, teacher_levels=teacher, feature_gate="all")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("sides", [("student",), ("teacher",), ("student", "teacher")], ids="-".join)
def test_one_tensor_for_any_of_the_sides(kernel, sides, reduction):
    scene = make_scene(302).to(torch.float32, device=kernel.device)
    levels, _ = random_levels(scene)
    given = {f"{side}_levels": levels for side in sides}
    assert_losses_match(kernel.ops, scene, reduction=reduction, bin_weight="gaussian", **given)


@pytest.mark.parametrize("geometry", ["equal", "strides", "repeated"])
def test_the_levels_of_the_rule_change_nothing(backend, geometry):
    scene = make_scene(303, geometry=geometry, regions=64).to(torch.float32, device=backend.device)
    given = dict(
        student_levels=rule_of(scene, scene.student_scales), teacher_levels=rule_of(scene, scene.teacher_scales)
    )
    for got, want in zip(*(losses_and_gradients(backend.ops, scene, **OPEN, **levels) for levels in (given, {}))):
        for tensor, target in zip(got, want):
            assert_values_close(tensor, target.double(), torch.float32)


@pytest.mark.parametrize("form", ["int32", "strided", "strided int32"])
def test_forms(kernel, form):
    scene = make_scene(304).to(torch.float32, device=kernel.device)
    wide = random_levels(scene)
    dtype = torch.int32 if "int32" in form else torch.int64
    student, teacher = (torch.stack([x, x + 99], 1).to(dtype)[:, 0] if "strided" in form else x.to(dtype) for x in wide)
    expected = losses_and_gradients(kernel.ops, scene, **OPEN, student_levels=wide[0], teacher_levels=wide[1])
    actual = losses_and_gradients(kernel.ops, scene, **OPEN, student_levels=student, teacher_levels=teacher)
    for got, want in zip(actual[0], expected[0]):
        assert torch.equal(got, want)
    assert_losses_match(kernel.ops, scene, student_levels=student, teacher_levels=student)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("fault", [-1, 4, 2**40])
def test_a_level_out_of_range_leaves_the_region_out(backend, fault, side):
    scene = make_scene(305).to(torch.float64, device=backend.device)
    given = dict(zip(("student_levels", "teacher_levels"), random_levels(scene)))
    bad = (scene.labels > 0).nonzero()[:, 0][[1, 4, 5]]
    keep = torch.ones_like(scene.labels, dtype=torch.bool)
    keep[bad] = False
    rest, kept = scene.rows(keep), {name: levels[keep] for name, levels in given.items()}
    given[f"{side}_levels"][bad] = fault
    losses, gradients = losses_and_gradients(backend.ops, scene, **OPEN, **given)
    assert not losses.gates[bad].any() and not losses.scores[bad].any()
    leaves = {name: getattr(rest, name).detach().requires_grad_() for name in ("student_logits", "student_deltas")}
    expected, targets = losses_and_gradients(backend.ops, rest.replace(**leaves), **OPEN, **kept)
    for term in TERMS:
        assert_values_close(getattr(losses, term), getattr(expected, term), torch.float64, term)
    for gradient, target in zip(gradients[:-2], targets[:-2]):
        torch.testing.assert_close(gradient, target)
    assert not gradients[-2][bad].any() and not gradients[-1][bad].any()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_checked_values(backend, monkeypatch, side):
    monkeypatch.setenv("TARDKD_CHECK", "1")
    scene = make_scene(306, geometry="strides").to(torch.float32, device=backend.device)
    levels = torch.zeros_like(scene.labels)
    count = len(getattr(scene, f"{side}_features"))
    levels[7] = count
    message = rf"region 7: its level in {side}_levels is not in \[0, {count}\): {count}"
    with pytest.raises(ValueError, match=message):
        backend.ops.region_distill_loss(*scene.inputs, **scene.scales, **{f"{side}_levels": levels})
    features, options = getattr(scene, f"{side}_features"), dict(scales=getattr(scene, f"{side}_scales"))
    with pytest.raises(ValueError, match=message.replace(f"{side}_levels", "levels")):
        backend.ops.multiscale_roi_align(features, scene.proposals, levels=levels, **options)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda levels: levels[:-1], ValueError, "levels has 31 rows but proposals hold 32 regions"),
        (lambda levels: levels[:, None], ValueError, r"levels must have shape \(R\), got \(32, 1\)"),
        (lambda levels: levels.float(), TypeError, "levels must be one of torch.int64, torch.int32; got torch.float32"),
        (lambda levels: levels.to("meta"), ValueError, "levels is on meta"),
        (lambda levels: levels.tolist(), TypeError, "levels must be a tensor"),
    ],
    ids=["rows", "axes", "dtype", "device", "list"],
)
def test_misfits_are_refused_by_name(backend, change, error, message):
    scene = make_scene(307).to(torch.float32, device=backend.device)
    levels = change(torch.zeros_like(scene.labels))
    for side in ("student", "teacher"):
        with pytest.raises(error, match=f"{side}_{message}"):
            backend.ops.region_distill_loss(*scene.inputs, **scene.scales, **{f"{side}_levels": levels})
    with pytest.raises(error, match=f"^{message}"):
        backend.ops.multiscale_roi_align(
            scene.student_features, scene.proposals, scales=scene.student_scales, levels=levels
        )


# --- RoIAlign -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_roi_align(backend, dtype, layout):
    scene = make_scene(308).to(dtype, None, layout, device=backend.device)
    levels, _ = random_levels(scene, dtype=torch.int32)
    options = dict(scales=scene.student_scales, levels=levels)
    assert_roi_align_matches(backend.ops, scene.student_features, scene.proposals, **options)


def test_roi_align_with_deterministic_algorithms(kernel, deterministic):
    """Where it takes other kernels to make the same gradients."""
    scene = make_scene(309, regions=60, channels=35).to(torch.float32, device=kernel.device)
    student, teacher = random_levels(scene)
    options = dict(scales=scene.student_scales, levels=student)
    assert_roi_align_matches(kernel.ops, scene.student_features, scene.proposals, **options)
    assert_losses_match(kernel.ops, scene, student_levels=student, teacher_levels=teacher)


def test_a_region_whose_level_does_not_exist_pools_to_zero(backend):
    scene = make_scene(310).to(torch.float64, device=backend.device)
    levels, _ = random_levels(scene)
    levels[[3, 8]] = torch.tensor([-1, 4], device=backend.device)
    options = dict(scales=scene.student_scales, levels=levels)
    pooled = backend.ops.multiscale_roi_align(scene.student_features, scene.proposals, **options)
    assert not pooled[[3, 8]].any() and pooled[[2, 4]].any()
    assert_roi_align_matches(backend.ops, scene.student_features, scene.proposals, **options)


def test_shared_roi_align(kernel):
    scene = make_scene(311, geometry="strides").to(torch.float32, device=kernel.device)
    student, teacher = random_levels(scene)
    pair = kernel.ops.shared_roi_align(
        scene.student_features,
        scene.teacher_features,
        scene.proposals,
        **scene.scales,
        student_levels=student,
        teacher_levels=teacher,
    )
    features, scales = (scene.student_features, scene.teacher_features), scene.scales.values()
    for pooled, maps, scale, levels in zip(pair, features, scales, (student, teacher)):
        expected = kernel.ops.multiscale_roi_align(maps, scene.proposals, scales=scale, levels=levels)
        assert torch.equal(pooled, expected)


# --- dispatcher, compiler, launches -------------------------------------------------------------------------------


def test_compiles_whole(host, deterministic):
    scene = make_scene(312, geometry="strides").to(torch.float32)
    levels = random_levels(scene)

    def step(student_features, teacher_features, student_levels, teacher_levels, *per_region):
        losses = host.ops.region_distill_loss(
            student_features,
            teacher_features,
            *per_region,
            **scene.scales,
            student_levels=student_levels,
            teacher_levels=teacher_levels,
            reduction="none",
        )
        pooled = host.ops.multiscale_roi_align(
            student_features, per_region[0], scales=scene.student_scales, levels=student_levels
        )
        return losses.feature.square().sum() + pooled.square().mean()

    arguments = (scene.student_features, scene.teacher_features, *levels, *scene.per_region)
    expected = step(*arguments)
    torch._dynamo.reset()
    actual = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)(*arguments)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(total, scene.student_features) for total in (actual, expected))
    for gradient, target in zip(*gradients):
        torch.testing.assert_close(gradient, target)


def test_no_more_launches(cuda_on_cpu):
    scene = make_scene(313).to(torch.float32)
    losses_and_gradients(tardkd.ops, scene, student_levels=random_levels(scene)[0])
    assert len(cuda_on_cpu.launches()) == 4  # of the loss, of the scaling of its gradients, of those of pixels
