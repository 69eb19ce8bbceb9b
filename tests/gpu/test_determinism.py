"""The same bits again, whatever torch.use_deterministic_algorithms says."""

from __future__ import annotations

import pytest
import torch

from .cases import STEPS, assert_identical, make_case, run

pytestmark = pytest.mark.gpu


def repeats(name, case):
    """Outcomes of runs beside other work, which changes the order in which the blocks get their turn."""
    noise, aside = torch.randn((2048, 2048), device="cuda"), torch.cuda.Stream()
    for size in (0, 256, 1024, 2048):
        with torch.cuda.stream(aside):
            for _ in range(20):
                noise[:size].sin_()
        yield run(name, case)
    torch.cuda.synchronize()


def busy_case(dtype, layout, geometry):
    return make_case(231, dtype, layout=layout, geometry=geometry, regions=400, channels=36, images=3)


@pytest.mark.parametrize("geometry", ["equal", "strides"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_deterministic_mode(deterministic, name, dtype, layout, geometry):
    first, *others = repeats(name, busy_case(dtype, layout, geometry))
    for other in others:
        assert_identical(other, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_default_mode(name, dtype):
    """Nothing is added up by atomics."""
    first, *others = repeats(name, busy_case(dtype, "channels_last", "equal"))
    for other in others:
        assert_identical(other, first)
