"""What a fuzzing run is made of: targets, whose cases follow from a seed and a number, and what a case may find."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

FINDINGS = ("crash", "hang", "silent NaN", "wrong result", "traceback")


class Finding(Exception):
    """A case that shows a fault; the kind is one of :data:`FINDINGS`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


@dataclass(frozen=True)
class Target:
    """Something that takes inputs.

    ``run`` makes inputs from a generator of random numbers, tries them, and yields what each of them counts as, e.g.
    "call" or "refused". It raises :class:`Finding`, or any other exception that is no clear refusal.
    """

    name: str
    run: Callable[[random.Random], Iterator[str]]
    hang: float = 10.0  # seconds after which a case is taken to hang, on a machine that has nothing else to do
    is_slow: bool = False  # would take the time of all others: runs only where it is named


def generator(seed: int, target: str, number: int) -> random.Random:
    """The random numbers of one case."""
    return random.Random(f"{seed} {target} {number}")


def slowness() -> float:
    """How many times as long as on an idle machine something takes here now: the processes for each of its cores."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
