"""``gaussian_feature_loss``, forward and backward, against the same in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import cases
import pytest
import record
import rivals
import roofline
import steps
import timing
from workloads import SCALES

from tardkd import ops

SIDES = ("tardkd", "eager", "compiled")


def step_of(side: str, compiled: Callable) -> steps.Step:
    if side == "tardkd":
        return steps.of_losses(
            lambda w: [
                ops.gaussian_feature_loss(w.student_features, w.teacher_features, w.gt_per_image, scales=SCALES)
            ],
            lambda w: w.student_features,
        )
    loss = compiled(rivals.gaussian_feature_loss) if side == "compiled" else rivals.gaussian_feature_loss
    return steps.of_losses(
        lambda w: [loss(w.student_features, w.teacher_features, w.gt_per_image, SCALES)], lambda w: w.student_features
    )


@pytest.mark.parametrize("case, side", cases.with_sides(SIDES))
def test_gaussian(benchmark, inputs_of, compiled, quick, case, side) -> None:
    inputs = inputs_of(case)
    step = step_of(side, compiled)
    ours = None if side == "tardkd" else step_of("tardkd", compiled)
    if ours is not None:
        steps.assert_agree(ours, step, inputs[0])
    info = record.describe(benchmark, "gaussian_feature_loss", side, case, inputs[0])
    timing.measure(benchmark, step, inputs, quick, ours)
    if side == "tardkd" and benchmark.enabled:
        work = roofline.gaussian(inputs[0])
        info |= work.describe(record.seconds_of(benchmark), inputs[0].labels.device)
