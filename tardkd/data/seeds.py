"""Random numbers that depend on what they are for, and on nothing that was drawn before."""

from __future__ import annotations

import numpy as np


def mix(*numbers: int) -> int:
    """One well-spread 64-bit seed from several numbers of at most 64 bits; ids may be negative."""
    return int(np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, np.uint64)[0])
