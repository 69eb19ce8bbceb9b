"""How close is close enough, in one place.

The expected values come from the same inputs in float64. ``value`` bounds what is computed in the
accumulation dtype (losses and scores, whatever the inputs' dtype); ``stored`` bounds what is rounded once
more to the inputs' dtype (pooled features and gradients). They are compared where the expected values lie.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    value: float
    stored: float
    tiny: float  # what rounding to a subnormal can cost


TOLERANCES = {
    torch.float64: Tolerance(value=1e-12, stored=1e-12, tiny=0.0),
    torch.float32: Tolerance(value=1e-5, stored=1e-5, tiny=0.0),
    torch.float16: Tolerance(value=1e-5, stored=2**-10, tiny=2**-24),
    torch.bfloat16: Tolerance(value=1e-5, stored=2**-8, tiny=0.0),
}


def assert_values_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "value") -> None:
    """Losses and scores: relative to the largest of them, or to 0.1 (a divergence of near equals cancels)."""
    _assert_finite_alike(actual, expected, what)
    actual, expected = actual.detach().double().to(expected.device), expected.detach().double()
    if expected.numel() == 0:
        return
    error = (actual - expected).abs()
    bound = TOLERANCES[dtype].value * (expected.abs() + expected.abs().max().clamp(min=0.1))
    assert (error <= bound).all(), f"{what}: off by {error.max():.3g}, expected up to {expected.abs().max():.3g}"


def assert_tensors_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "gradient") -> None:
    """Pooled features and gradients: stricter than an elementwise bound alone.

    A kernel that drops a tap, rounds always down or leaks a little everywhere may stay within a loose bound;
    the relative L2 distance, the cosine and the signed mean of the error find it.
    """
    _assert_finite_alike(actual, expected, what)
    assert actual.dtype == dtype, f"{what} is {actual.dtype}, expected {dtype}"
    if expected.numel() == 0:
        return
    actual, expected = actual.detach().double().to(expected.device), expected.detach().double()
    tolerance = TOLERANCES[dtype]
    error = actual - expected
    largest = expected.abs().max()
    if largest == 0:
        assert (actual == 0).all(), f"{what}: should be zero everywhere, found {actual.abs().max():.3g}"
        return

    rounding = TOLERANCES[dtype].value * largest + tolerance.tiny
    excess = error.abs() - (tolerance.stored * expected.abs() + rounding)
    assert (excess <= 0).all(), (
        f"{what}: element {tuple(int(i) for i in (excess == excess.max()).nonzero()[0])} is off by "
        f"{error.flatten()[excess.argmax()]:.3g}, largest {largest:.3g}"
    )
    subnormal = tolerance.tiny * error.numel() ** 0.5  # share of the norm that subnormal rounding explains
    relative_l2 = (error.norm() - subnormal).clamp(min=0) / expected.norm()
    assert relative_l2 <= tolerance.stored, f"{what}: relative L2 error {relative_l2:.3g}"
    cosine = torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0)
    if subnormal < 0.1 * tolerance.stored * expected.norm():
        assert cosine >= 1 - tolerance.stored**2 - 1e-12, f"{what}: cosine {cosine:.12f}"
    # Rounding to nearest errs both ways; truncation shrinks everything, a leak shifts everything. Equal
    # values err alike, so tensors made of few values are excused.
    nonzero = int((expected != 0).sum())
    if nonzero >= 64 and len(expected.float().unique()) > nonzero / 2:
        count = expected.abs().sum() ** 2 / expected.square().sum()  # of the values that matter
        average = expected.abs().mean()
        allowed = tolerance.stored * (1 / 8 + 1 / count.sqrt()) + tolerance.tiny / average
        for kind, signed in (("shift", error), ("growth", error * expected.sign())):
            bias = signed.mean() / average
            assert bias.abs() <= allowed, f"{what}: signed bias ({kind}) {bias:.3g}"


def _assert_finite_alike(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, f"{what} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert expected.isfinite().all(), f"{what}: the expected values are not finite"
    assert actual.isfinite().all(), f"{what}: {int((~actual.isfinite()).sum())} values are not finite"
