"""Growth curves of ``region_distill_loss`` and its eager rivals: one size varies, the others are COCO's.

Run with ``--sweep``.
"""

from __future__ import annotations

import os

import cases
import pytest
import record
import steps
import timing
import torch
import workloads
from test_region_distill import step_of

SIDES = ("tardkd", "eager", "filtered", "pooled")
OPEN_SHARE = "share of regions open"
THREADS = "threads"


def image(height: int) -> dict[str, int]:
    """COCO's aspect ratio, sides that 32 divides."""
    return dict(height=height, width=round(height * 1.68 / 32) * 32)


# Name of the curve: value on its axis and the sizes that differ from COCO's.
CURVES = {
    "regions an image": [(n, dict(regions=n)) for n in (64, 256, 1024)],
    OPEN_SHARE: [(share, dict(foreground=share)) for share in (0.0, 0.1, 0.25, 1.0)],
    "channels": [(n, dict(channels=n)) for n in (64, 128, 256)],
    "image height": [(h, image(h)) for h in (320, 480, 800)],
    "images": [(n, dict(images=n)) for n in (1, 2, 4)],
    "classes": [(n, dict(classes=n)) for n in (20, 80, 1203)],
    THREADS: [(n, {}) for n in (1, 2, 4, 8, 16) if n <= (os.cpu_count() or 1)],
}


def points() -> list:
    """(case, curve, value, sizes); the threads are those of the CPU."""
    first = cases.CASES[0]
    on_cpu = next(case for case in cases.CASES if case.device == "cpu")

    def point(curve: str, value: float, sizes: dict):
        case = on_cpu if curve == THREADS else first
        return pytest.param(case, curve, value, sizes, id=f"{curve} {value}".replace(" ", "-"))

    return [point(curve, *of_curve) for curve, values in CURVES.items() for of_curve in values]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case, curve, value, sizes", points())
def test_growth(benchmark, inputs_of, compiled, quick, case, curve, value, sizes, side) -> None:
    if curve == THREADS:
        torch.set_num_threads(value)
    # Every region would be open by "all"; of the curve over open regions exactly the foreground is.
    gate = "foreground" if curve == OPEN_SHARE else "either"
    inputs = inputs_of(case, workloads.coco, **sizes)
    step = step_of(side, gate, compiled)
    ours = None if side == "tardkd" else step_of("tardkd", gate, compiled)
    if ours is not None:
        steps.assert_agree(ours, step, inputs[0])
    info = record.describe(benchmark, "region_distill_loss", side, case, inputs[0], gate)
    benchmark.group = f"growth with {curve}: {value}"
    info |= {"curve": curve, "value": value}
    timing.measure(benchmark, step, inputs, quick, ours)
