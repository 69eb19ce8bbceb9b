"""What the region losses return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RegionLosses(NamedTuple):
    """The three losses of a set of shared regions, and the decisions behind them.

    ``R`` is the number of regions. The losses are scalars, or ``(R,)`` with ``reduction="none"``; they and
    ``scores`` have the accumulation dtype (float64 for float64 inputs, float32 otherwise). ``gates`` and
    ``scores`` carry no gradient.
    """

    feature: Tensor  # () or (R,)
    classification: Tensor  # () or (R,)
    regression: Tensor  # () or (R,)
    gates: Tensor  # (R, 3) bool: feature, classification, regression
    scores: Tensor  # (R, 4): p_T(y), p_S(y), IoU of the teacher's box, IoU it was compared with
