"""How many kernels an op launches, what torch launches beside them, and whether the order of their threads shows.

Run by csrc/cuda_on_cpu and csrc/ptx_on_cpu, which count launches and shuffle blocks and threads by a seed.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tardkd.ops
from tardkd.ops.registry import run_kernels

from .scenes import LEVEL_RULE, make_boxes, make_scene
from .test_distribution import make_inputs
from .test_pooled_loss import make_pooled

# Each makes its inputs and returns what calls the op, and the leaves.


def region(scene, **options):
    options = {**scene.scales, **LEVEL_RULE, "feature_gate": "all", **options}
    return lambda: tardkd.ops.region_distill_loss(*scene.inputs, **options)[:3], scene.leaves


def pooled(scene, **options):
    dtype = scene.student_logits.dtype
    student, teacher = make_pooled(scene, dtype, dtype)
    leaves = [student, scene.student_logits, scene.student_deltas]
    return lambda: tardkd.ops.pooled_distill_loss(student, teacher, *scene.per_region, **options)[:3], leaves


def heads(scene, **options):
    leaves = [scene.student_logits, scene.student_deltas]
    return lambda: tardkd.ops.head_distill_loss(*scene.per_region, **options)[:3], leaves


def align(scene, **options):
    features, options = scene.student_features, {"scales": scene.student_scales, **LEVEL_RULE, **options}
    return lambda: [tardkd.ops.multiscale_roi_align(features, scene.proposals, **options)], features


def gaussian(scene, boxes=9):
    features, options = scene.student_features, dict(scales=scene.student_scales)
    gt_boxes = [make_boxes(torch.Generator().manual_seed(1), boxes)] * 2
    others = [f.detach() + 1 for f in features]
    return lambda: [tardkd.ops.gaussian_feature_loss(features, others, gt_boxes, **options)], features


def distribution(scene, **options):
    dtype = scene.student_logits.dtype
    student, teacher, gates = make_inputs(0, len(scene.labels), 16, dtype, layout="bins first")
    return lambda: [tardkd.ops.distribution_distill_loss(student, teacher, gates, **options)], [student]


STEPS = {
    "region": region,
    "region-none": lambda scene: region(scene, reduction="none"),
    "pooled": pooled,
    "pooled-none": lambda scene: pooled(scene, reduction="none"),
    "heads": heads,
    "heads-none": lambda scene: heads(scene, reduction="none"),
    "align": align,
    "gaussian": gaussian,
    "distribution": distribution,
    "distribution-none": lambda scene: distribution(scene, reduction="none"),
}


# Launches of the forward and of the backward pass, whether or not torch is told to be deterministic.
LAUNCHES = {
    "region": (1, 3),
    "region-none": (1, 3),
    "pooled": (1, 2),
    "pooled-none": (1, 1),
    "heads": (1, 1),
    "heads-none": (1, 1),
    "align": (1, 2),
    "gaussian": (1, 1),
    "distribution": (1, 1),
    "distribution-none": (1, 1),
}


def assert_launches(module, step, expected):
    run, leaves = step(make_scene(151).to(torch.float32))
    outputs = run()
    forward = module.launches()
    torch.autograd.grad(outputs, leaves, list(map(torch.ones_like, outputs)))
    both = module.launches()
    assert (len(forward), len(both) - len(forward)) == expected, both


@pytest.mark.parametrize("name", STEPS)
def test_launches(stand_in, name):
    assert_launches(stand_in, STEPS[name], LAUNCHES[name])


@pytest.mark.parametrize("name", STEPS)
def test_launches_with_deterministic_algorithms(stand_in, deterministic, name):
    assert_launches(stand_in, STEPS[name], LAUNCHES[name])


def test_no_backward_pass_no_more_launches(stand_in):
    scene = make_scene(152).to(torch.float32)
    with torch.no_grad():
        for count, step in enumerate(STEPS.values(), 1):
            run, _ = step(scene)
            run()
            assert len(stand_in.launches()) == count


# --- what torch launches beside them ---------------------------------------------------------------------

BESIDE = {
    "region": (["zeros"], []),
    "region-none": (["zeros"], ["stack", "zeros"]),
    "pooled": (["zeros"], ["zeros"]),
    "pooled-none": (["zeros"], ["stack", "zeros"]),
    "heads": (["zeros"], []),
    "heads-none": (["zeros"], ["stack", "zeros"]),
    "align": ([], []),
    "gaussian": (["full_like"] * 2 + ["cat"] * 3 + ["zeros"], []),
    "distribution": (["zeros"], ["mul"]),
    "distribution-none": (["zeros"], []),
}


class Launches(TorchDispatchMode):
    """Notes the ops of torch, inside ours too, that compute something or wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if func.namespace == "tardkd":
            with self:
                return run_kernels(name, "CPU", args)
        result = func(*args, **(kwargs or {}))
        view = func.is_view and not (name == "to" and result is not args[0])
        if not view and "empty" not in name:
            self.seen.append(name)
        return result


@pytest.mark.parametrize("name", STEPS)
def test_what_torch_launches_beside_them(cuda_on_cpu, name):
    """A fill; and nothing that waits, such as _local_scalar_dense or nonzero."""
    run, leaves = STEPS[name](make_scene(155).to(torch.float32))
    with Launches() as forward:
        outputs = run()
    upstream = list(map(torch.ones_like, outputs))
    with Launches() as backward:
        torch.autograd.grad(outputs, leaves, upstream)
    assert (forward.seen, backward.seen) == BESIDE[name]


@pytest.mark.parametrize("name", STEPS)
def test_nothing_is_copied_before_a_launch(cuda_on_cpu, name):
    """Whatever the dtypes and strides; rounding to the features' dtype comes after it."""
    run, leaves = STEPS[name](make_scene(155).to(torch.bfloat16, None, "channels_last", "sliced"))
    with Launches() as forward:
        outputs = run()
    upstream = list(map(torch.ones_like, outputs))
    with Launches() as backward:
        torch.autograd.grad(outputs, leaves, upstream)
    assert forward.seen == BESIDE[name][0]
    assert [op for op in backward.seen if op not in ("to", "_to_copy")] == BESIDE[name][1]


# --- the order of the threads --------------------------------------------------------------------------


def results_of_orders(module, name, dtype, layout):
    """Outputs and gradients under several orders of blocks and threads."""
    scene = make_scene(153, regions=96, channels=6).to(dtype, None, layout)
    for seed in range(4):
        module.set_seed(seed)
        run, leaves = STEPS[name](scene)
        outputs = run()
        yield outputs, torch.autograd.grad(outputs, leaves, list(map(torch.ones_like, outputs)))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_any_order_gives_the_same_bits(stand_in, name, dtype, layout):
    (outputs, gradients), *others = results_of_orders(stand_in, name, dtype, layout)
    for other_outputs, other_gradients in others:
        assert all(map(torch.equal, other_outputs, outputs))
        assert all(map(torch.equal, other_gradients, gradients))


# --- errors --------------------------------------------------------------------------------------------


def test_a_launch_that_fails_names_its_kernel(stand_in):
    """More bins than shared memory holds."""
    scene = make_scene(154, regions=2).to(torch.float64)
    student, teacher = make_pooled(scene, torch.float64, torch.float64, size=(200, 200), channels=1)
    with pytest.raises(RuntimeError, match="^tardkd: CUDA kernel pooled_distill: invalid"):
        tardkd.ops.pooled_distill_loss(student, teacher, *scene.per_region)
    student, teacher = make_pooled(scene, torch.float64, torch.float64)
    assert tardkd.ops.pooled_distill_loss(student, teacher, *scene.per_region).feature.isfinite()
