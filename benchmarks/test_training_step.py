"""A whole training step: the student alone, and with its teacher by tardkd and by plain PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import cases
import pytest
import record
import torch
from pairs import Pair
from steps import SLACK
from tolerances import TOLERANCES
from torch import Tensor

from tardkd.distill import distiller

ROUNDS = {"cpu": 9, "cuda": 20}
PYRAMIDS = "tardkd, pyramids pooled"


def without_tap(step: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """The same step where the feature term's gradient is a pyramid of its own, which autograd adds."""

    def run() -> dict[str, Tensor]:
        with patch.object(distiller, "tapped_maps", lambda module, losses: nullcontext([])):
            return step()

    return run


@pytest.mark.parametrize("device", list(dict.fromkeys(case.device for case in cases.CASES)))
def test_training_step(benchmark, quick, device) -> None:
    """All sides in turn, so that a slow moment of the machine meets them all."""
    pair = Pair(device, tiny=quick)
    sides = pair.sides()
    sides[f"{PYRAMIDS}, without a tap"] = without_tap(sides[PYRAMIDS])
    first = {name: step() for name, step in sides.items()}
    expected = first["tardkd"]
    for name, losses in first.items():
        for term, value in losses.items():
            tolerance = SLACK * TOLERANCES[torch.float32].stored
            torch.testing.assert_close(value, expected[term], rtol=tolerance, atol=tolerance, msg=f"{name}: {term}")
    sides |= {"teacher's trunk": pair.teacher_trunk, "whole teacher": pair.whole_teacher}
    seconds: dict[str, list[float]] = {name: [] for name in sides}

    def all_in_turn() -> None:
        order = list(sides.items())
        for name, step in order if len(seconds["tardkd"]) % 2 else reversed(order):  # nobody always follows the same
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)

    # On a CPU the comparison above has warmed up enough.
    rounds = 1 if quick else ROUNDS[device]
    benchmark.pedantic(all_in_turn, rounds=rounds, warmup_rounds=1 if device == "cuda" else 0)
    benchmark.group = f"training step / {device}"
    benchmark.extra_info |= record.about_the_run(device) | {
        "training_step": pair.names,
        "case": device,
        "quick": quick,
        "seconds_of": {name: times[-rounds:] for name, times in seconds.items()},  # not warm-up's
    }
