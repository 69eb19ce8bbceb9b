"""``region_distill_loss``, forward and backward, against torchvision's RoIAlign and PyTorch losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import cases
import pytest
import record
import rivals
import roofline
import steps
import timing
import torch
from torch import Tensor
from workloads import SCALES, Workload

from tardkd import ops

# The same work, pooling included. "filtered": only what the gates open; "subtracted": pools the difference of the maps.
POOLING = {
    "eager": {},
    "compiled": {},
    "filtered": dict(filtered=True),
    "filtered compiled": dict(filtered=True),
    "subtracted": dict(subtracted=True),
    "subtracted filtered": dict(subtracted=True, filtered=True),
}
# Losses on regions that the box heads have pooled already, gradients up to there.
POOLED = {
    "pooled": {},
    "pooled compiled": {},
    "pooled filtered": dict(filtered=True),
}
# Other losses, for scale.
WHOLE_MAPS = {
    "imitation": rivals.imitation_loss,
    "imitation compiled": rivals.imitation_loss,
    "correlation": rivals.correlation_loss,
    "correlation compiled": rivals.correlation_loss,
}


# Beside COCO's: a small image alone, and as many as fit into a CPU's patience.
SIZES = {
    "small": dict(images=1, height=320, width=480, regions=128),
    "large": dict(images=8 if cases.has_cuda() else 4),
}


def tardkd_losses(gate: str, workload: Workload) -> Sequence[Tensor]:
    features = (workload.student_features, workload.teacher_features, workload.boxes)
    return ops.region_distill_loss(*features, *workload.per_region, student_scales=SCALES, feature_gate=gate)[:3]


def step_of(side: str, gate: str, compiled: Callable) -> steps.Step:
    prepare = compiled if side.endswith("compiled") else lambda function: function
    if side in POOLING:
        loss = prepare(rivals.RegionDistill(len(SCALES), gate, **POOLING[side]))
        return steps.of_losses(
            lambda w: loss(w.student_features, w.teacher_features, w.boxes, w.image_shapes, *w.per_region)
        )
    if side in POOLED:
        loss = prepare(partial(rivals.pooled_losses, feature_gate=gate, **POOLED[side]))
        return steps.of_losses(lambda w: loss(*w.pooled, torch.cat(w.boxes), *w.per_region), lambda w: w.pooled_leaves)
    if side in WHOLE_MAPS:
        loss = prepare(WHOLE_MAPS[side])
        return steps.of_losses(lambda w: [loss(w.student_features, w.teacher_features)], lambda w: w.student_features)
    return steps.of_losses(partial(tardkd_losses, gate))


@pytest.mark.parametrize("gate", rivals.FEATURE_GATES)
@pytest.mark.parametrize("case, side", cases.with_sides(["tardkd", *POOLING, *POOLED]))
def test_regions(benchmark, inputs_of, compiled, quick, case, side, gate) -> None:
    compare_and_time(benchmark, inputs_of(case), step_of(side, gate, compiled), quick, case, side, gate)


@pytest.mark.parametrize("gate", ["all", "either"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("side", ["tardkd", "eager", "filtered", "pooled"])
def test_other_sizes(benchmark, inputs_of, compiled, quick, side, sizes, gate) -> None:
    case = cases.CASES[0]
    compare_and_time(benchmark, inputs_of(case, **sizes), step_of(side, gate, compiled), quick, case, side, gate)


def compare_and_time(benchmark, inputs, step, quick, case, side, gate) -> None:
    ours = None if side == "tardkd" else step_of("tardkd", gate, None)
    if ours is not None:
        steps.assert_agree(ours, step, inputs[0])
    info = record.describe(benchmark, "region_distill_loss", side, case, inputs[0], gate)
    timing.measure(benchmark, step, inputs, quick, ours)
    if side == "tardkd":
        features = (inputs[0].student_features, inputs[0].teacher_features, inputs[0].boxes)
        losses = ops.region_distill_loss(*features, *inputs[0].per_region, student_scales=SCALES, feature_gate=gate)
        info["open"] = losses.gates.float().mean(0).tolist()
        info["gradient_bytes"] = sum(leaf.nbytes for leaf in inputs[0].leaves)
        if benchmark.enabled:
            work = roofline.region_distill(inputs[0], losses.gates)
            info |= work.describe(record.seconds_of(benchmark), inputs[0].labels.device)


@pytest.mark.parametrize("case, side", cases.with_sides(WHOLE_MAPS))
def test_whole_maps(benchmark, inputs_of, compiled, quick, case, side) -> None:
    """Not the same work, so there is nothing to compare but that it is finite."""
    inputs = inputs_of(case)
    step = step_of(side, "all", compiled)
    assert all(result.isfinite() for result in step(inputs[0]))
    record.describe(benchmark, "region_distill_loss", side, case, inputs[0], "all")
    timing.measure(benchmark, step, inputs, quick, step_of("tardkd", "all", None))
