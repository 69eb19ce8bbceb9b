"""The CUDA kernels as torch's profiler, allocator, dispatcher, compiler and autocast see them."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable

import pytest
import torch
from ops.scenes import make_scene
from ops.test_launches import LAUNCHES
from ops.test_registration import STEPS as COMPILED
from ops.test_registration import Calls, leaves_of
from tolerances import assert_tensors_close, assert_values_close
from torch.autograd import DeviceType

import tardkd.ops

from .cases import STEPS, make_case, run

pytestmark = pytest.mark.gpu


# --- launches ------------------------------------------------------------------------------------------------------


def launches(function: Callable) -> tuple[list[str], list[str]]:
    """Names of the kernels, fills and copies on the device: ours, and the others."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
    return [name for name in names if "tardkd" in name], [name for name in names if "tardkd" not in name]


@pytest.mark.parametrize("mode", ["default", "deterministic"])
@pytest.mark.parametrize("name", STEPS)
def test_launches(request, name, mode):
    """The kernels, one fill of all that must start from zero, and after them only scaling and casting."""
    of_forward, of_backward = LAUNCHES[name.removesuffix("-all")]
    if mode == "deterministic":
        request.getfixturevalue("deterministic")
        # torch would fill whatever is allocated.
        torch.utils.deterministic.fill_uninitialized_memory = False
        request.addfinalizer(lambda: setattr(torch.utils.deterministic, "fill_uninitialized_memory", True))
    case = make_case(241)
    run(name, case)
    launches(lambda: None)
    forward = []
    ours, others = launches(lambda: forward.append(STEPS[name](case)))
    fills = [name for name in others if re.search("fill|memset", name, re.IGNORECASE)]
    assert len(ours) == of_forward, ours
    if name != "gaussian":  # which first makes one tensor of its list of boxes
        assert fills == others and len(fills) <= 1, others
    ours, others = launches(forward[0].backward)
    assert len(ours) == of_backward, ours
    assert not any(re.search("memcpy|reduce|index|scatter|gather", name, re.IGNORECASE) for name in others), others


def test_the_flagship_is_one_kernel():
    case = make_case(242, channels=64, geometry="strides")
    run("region", case)
    launches(lambda: None)
    ours, others = launches(lambda: STEPS["region"](case))
    assert len(ours) == 1 and "region_distill" in ours[0], ours
    assert len(others) <= 1, others


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["default", "deterministic"])
@pytest.mark.parametrize("name", STEPS)
def test_no_memory_is_left_behind(request, name, mode):
    if mode == "deterministic":
        request.getfixturevalue("deterministic")
    case = make_case(243)

    def allocated_after(runs: int) -> int:
        for _ in range(runs):
            run(name, case)
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    assert allocated_after(3) == allocated_after(200)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed"])
@pytest.mark.parametrize("name", ["region-all", "pooled", "gaussian"])
def test_features_are_read_where_they_lie(name, layout):
    """No copy, no conversion: without gradients the ops take next to no memory."""
    case = make_case(244, torch.bfloat16, torch.float16, layout, channels=256)
    with torch.no_grad():
        STEPS[name](case)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        STEPS[name](case)
        taken = torch.cuda.max_memory_allocated() - before
    features = case.scene.student_features
    smallest = case.pooled[:1] if name.startswith("pooled") else features
    assert taken < 0.1 * sum(feature.numel() * feature.element_size() for feature in smallest), taken


# --- dispatcher, compiler, autocast ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["default", "deterministic"])
def test_opcheck(request, mode):
    if mode == "deterministic":
        request.getfixturevalue("deterministic")
    case = make_case(245, layout="channels_last")
    with Calls() as calls:
        for name in STEPS:
            run(name, case)
            with torch.no_grad():
                STEPS[name](case)
    assert calls.seen
    for func, args, kwargs in calls.seen:
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(func, args, kwargs, test_utils=tests)


@pytest.mark.parametrize("name, compiler", [*((name, "aot_eager") for name in COMPILED), ("region", "inductor")])
def test_compiles_whole(name, compiler):
    torch._dynamo.reset()
    options = dict(geometry="single", images=3)
    step, arguments_of = COMPILED[name](make_scene(246, **options))
    compiled = torch.compile(step, backend=compiler, fullgraph=True, dynamic=True)
    for regions in (37, 29):
        arguments = arguments_of(make_scene(246, regions=regions, **options).to(torch.float32, device="cuda"))
        leaves = leaves_of(arguments)
        expected, actual = step(*arguments), compiled(*arguments)
        for one, other in zip(actual, expected):
            torch.testing.assert_close(one, other)
        gradients, targets = (torch.autograd.grad(loss, leaves, allow_unused=True) for loss, _ in (actual, expected))
        for gradient, target in zip(gradients, targets):
            if target is None:  # of a loss that is not used, which counts as times zero once compiled
                assert gradient is None or not gradient.any()
            else:
                assert_tensors_close(gradient, target, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_loss_scaling(dtype):
    """A student under autocast, a teacher that ran without, and a loss too small for float16 unless scaled."""
    scene = make_scene(247, images=1, geometry="single").to(torch.float32, device="cuda")
    backbone = torch.nn.Conv2d(3, 5, 3, stride=16, padding=1).to("cuda", memory_format=torch.channels_last)
    image = torch.rand((1, 3, 96, 160), device="cuda").contiguous(memory_format=torch.channels_last)
    weights = torch.full_like(scene.region_weights, 1e-5)

    def losses(feature):
        options = dict(student_scales=scene.student_scales, teacher_scales=scene.teacher_scales, region_weights=weights)
        return tardkd.ops.region_distill_loss([feature], scene.teacher_features, *scene.per_region, **options)

    with torch.autocast("cuda", dtype):
        feature = backbone(image)
        inside = losses(feature)
    assert feature.dtype == dtype and inside.feature.dtype == torch.float32
    feature.retain_grad()
    torch.amp.GradScaler("cuda", init_scale=2.0**16).scale(inside.feature).backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in backbone.parameters())

    wide = feature.detach().double().requires_grad_()
    scene = scene.to(torch.float64, device="cuda")
    expected = losses(wide)
    assert_values_close(inside.feature, expected.feature, dtype)
    (target,) = torch.autograd.grad(expected.feature, wide, expected.feature.new_tensor(2.0**16))
    assert_tensors_close(feature.grad, target, dtype)
