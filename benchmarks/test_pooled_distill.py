"""``pooled_distill_loss``, forward and backward, against PyTorch losses on the same pooled regions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import cases
import pytest
import record
import rivals
import roofline
import steps
import timing
import torch

from tardkd import ops

SIDES = {"eager": {}, "compiled": {}, "filtered": dict(filtered=True), "filtered compiled": dict(filtered=True)}


def step_of(side: str, gate: str, compiled: Callable) -> steps.Step:
    if side == "tardkd":
        return steps.of_losses(
            lambda w: ops.pooled_distill_loss(*w.pooled, w.boxes, *w.per_region, feature_gate=gate)[:3],
            lambda w: w.pooled_leaves,
        )
    loss = partial(rivals.pooled_losses, feature_gate=gate, **SIDES[side])
    if side.endswith("compiled"):
        loss = compiled(loss)
    return steps.of_losses(lambda w: loss(*w.pooled, torch.cat(w.boxes), *w.per_region), lambda w: w.pooled_leaves)


@pytest.mark.parametrize("gate", rivals.FEATURE_GATES)
@pytest.mark.parametrize("case, side", cases.with_sides(["tardkd", *SIDES]))
def test_pooled(benchmark, inputs_of, compiled, quick, case, side, gate) -> None:
    inputs = inputs_of(case)
    step = step_of(side, gate, compiled)
    ours = None if side == "tardkd" else step_of("tardkd", gate, compiled)
    if ours is not None:
        steps.assert_agree(ours, step, inputs[0])
    info = record.describe(benchmark, "pooled_distill_loss", side, case, inputs[0], gate)
    timing.measure(benchmark, step, inputs, quick, ours)
    if side == "tardkd" and benchmark.enabled:
        one = inputs[0]
        gates = ops.pooled_distill_loss(*one.pooled, one.boxes, *one.per_region, feature_gate=gate).gates
        work = roofline.pooled_distill(one, gates)
        info |= work.describe(record.seconds_of(benchmark), inputs[0].labels.device)
