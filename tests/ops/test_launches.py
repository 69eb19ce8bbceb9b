"""How many kernels an op launches, and whether the order of their threads shows in the results.

Run by csrc/cuda_on_cpu, which counts launches and shuffles blocks and threads by a seed.
"""

from __future__ import annotations

import pytest
import torch

import tardkd.ops

from .scenes import LEVEL_RULE, make_boxes, make_scene
from .test_pooled_loss import make_pooled


def region(scene, **options):
    options = dict(**scene.scales, **LEVEL_RULE, feature_gate="all", **options)
    return tardkd.ops.region_distill_loss(*scene.inputs, **options)[:3], scene.leaves


def pooled(scene, **options):
    student, teacher = make_pooled(scene)
    losses = tardkd.ops.pooled_distill_loss(student, teacher, *scene.per_region, **options)[:3]
    return losses, [student, scene.student_logits, scene.student_deltas]


def align(scene):
    options = dict(scales=scene.student_scales, **LEVEL_RULE)
    return [tardkd.ops.multiscale_roi_align(scene.student_features, scene.proposals, **options)], scene.student_features


def gaussian(scene):
    gt_boxes = [make_boxes(torch.Generator().manual_seed(1), 9)] * 2
    others = [f.detach() + 1 for f in scene.student_features]
    options = dict(scales=scene.student_scales)
    return [tardkd.ops.gaussian_feature_loss(scene.student_features, others, gt_boxes, **options)], scene.student_features


STEPS = {
    "region": region,
    "region-none": lambda scene: region(scene, reduction="none"),
    "pooled": pooled,
    "pooled-none": lambda scene: pooled(scene, reduction="none"),
    "align": align,
    "gaussian": gaussian,
}


def backward(losses, leaves):
    return torch.autograd.grad([loss.sum() for loss in losses], leaves)


# Launches of the forward and of the backward pass.
LAUNCHES = {
    "region": (1, 0),
    "region-none": (1, 1),
    "pooled": (1, 1),
    "pooled-none": (1, 1),
    "align": (1, 1),
    "gaussian": (1, 1),
}
DETERMINISTIC_LAUNCHES = {
    "region": (3, 0),
    "region-none": (1, 3),
    "pooled": (1, 1),
    "pooled-none": (1, 1),
    "align": (1, 2),
    "gaussian": (1, 1),
}


def assert_launches(module, step, expected):
    scene = make_scene(151).to(torch.float32)
    losses, leaves = step(scene)
    forward = module.launches()
    backward(losses, leaves)
    both = module.launches()
    assert (len(forward), len(both) - len(forward)) == expected, both


@pytest.mark.parametrize("name", STEPS)
def test_launches(cuda_on_cpu, name):
    assert_launches(cuda_on_cpu, STEPS[name], LAUNCHES[name])


@pytest.mark.parametrize("name", STEPS)
def test_launches_with_deterministic_algorithms(cuda_on_cpu, deterministic, name):
    assert_launches(cuda_on_cpu, STEPS[name], DETERMINISTIC_LAUNCHES[name])


def test_no_backward_pass_no_more_launches(cuda_on_cpu):
    scene = make_scene(152).to(torch.float32)
    with torch.no_grad():
        for count, step in enumerate(STEPS.values(), 1):
            step(scene)
            assert len(cuda_on_cpu.launches()) == count


# --- the order of the threads --------------------------------------------------------------------------


def results_of_orders(module, name, dtype, layout):
    """Losses and gradients under several orders of blocks and threads."""
    scene = make_scene(153, regions=96, channels=6).to(dtype, None, layout)
    for seed in range(4):
        module.set_seed(seed)
        losses, leaves = STEPS[name](scene)
        yield losses, backward(losses, leaves)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_deterministic_algorithms_give_the_same_bits_in_any_order(cuda_on_cpu, deterministic, name, dtype, layout):
    (losses, gradients), *others = results_of_orders(cuda_on_cpu, name, dtype, layout)
    for other_losses, other_gradients in others:
        assert all(map(torch.equal, other_losses, losses))
        assert all(map(torch.equal, other_gradients, gradients))


@pytest.mark.parametrize("name", STEPS)
def test_atomics_touch_the_gradients_of_maps_alone(cuda_on_cpu, name):
    (losses, gradients), *others = results_of_orders(cuda_on_cpu, name, torch.float32, "nchw")
    maps = gradients[:4] if name.startswith(("region", "align")) else ()
    for other_losses, other_gradients in others:
        assert all(map(torch.equal, other_losses, losses))
        assert all(map(torch.equal, other_gradients[len(maps) :], gradients[len(maps) :]))
        torch.testing.assert_close(other_gradients, gradients, rtol=1e-4, atol=1e-6)
    if maps:  # else the test above shows nothing
        assert any(not torch.equal(*pair) for _, other in others for pair in zip(maps, other))


# --- errors --------------------------------------------------------------------------------------------


def test_a_launch_that_fails_names_its_kernel(cuda_on_cpu):
    """More bins than shared memory holds."""
    scene = make_scene(154, regions=2).to(torch.float64)
    student, teacher = make_pooled(scene, torch.float64, torch.float64, size=(200, 200), channels=1)
    with pytest.raises(RuntimeError, match="^tardkd: CUDA kernel pooled_distill: invalid"):
        tardkd.ops.pooled_distill_loss(student, teacher, *scene.per_region)
    student, teacher = make_pooled(scene, torch.float64, torch.float64)
    assert tardkd.ops.pooled_distill_loss(student, teacher, *scene.per_region).feature.isfinite()
