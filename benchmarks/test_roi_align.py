"""``multiscale_roi_align``, forward and backward, against torchvision's ``MultiScaleRoIAlign``."""

from __future__ import annotations

import cases
import pytest
import record
import rivals
import roofline
import steps
import timing
from workloads import SCALES

from tardkd import ops


def step_of(side: str) -> steps.Step:
    pool = rivals.Pool(len(SCALES))
    forward = {
        "tardkd": lambda w: [ops.multiscale_roi_align(w.student_features, w.boxes, scales=SCALES)],
        "torchvision": lambda w: [pool(w.student_features, w.boxes, w.image_shapes)],
    }[side]
    return steps.Step(forward, lambda w: w.student_features, lambda w: [w.pooled[1]])


@pytest.mark.parametrize("case, side", cases.with_sides(["tardkd", "torchvision"]))
def test_roi_align(benchmark, inputs_of, quick, case, side) -> None:
    inputs = inputs_of(case)
    step = step_of(side)
    ours = None if side == "tardkd" else step_of("tardkd")
    if ours is not None:
        steps.assert_agree(ours, step, inputs[0])
    info = record.describe(benchmark, "multiscale_roi_align", side, case, inputs[0])
    timing.measure(benchmark, step, inputs, quick, ours)
    if side == "tardkd" and benchmark.enabled:
        work = roofline.roi_align(inputs[0])
        info |= work.describe(record.seconds_of(benchmark), inputs[0].labels.device)
