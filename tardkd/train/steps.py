"""What is known of a training step: at first its place and its images, later its numbers and how long it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tardkd.device import HostCopy
from tardkd.distill import Distiller
from tardkd.train.batches import Part
from tardkd.train.distributed import Processes


@dataclass
class Step:
    """One step of a run."""

    number: int  # among all steps of the run, from 1
    epoch: int  # the epoch that it is part of, from 1
    rate: float  # the learning rate
    parts: Sequence[Part]  # this process's share of the batch
    losses: list[str] = field(default_factory=list)  # which of the numbers are losses
    numbers: Numbers | None = None  # on their way to the host
    values: dict[str, float] | None = None  # the numbers as means over all processes, once they have been read
    norm: HostCopy | None = None  # the norm of the gradient before clipping, on its way to the host
    seconds: float = 0.0  # what the step took, loading included
    teachers_seconds: float = 0.0  # how many of these the teachers took; 0 on a GPU, where nobody waits for them

    def __str__(self) -> str:
        images = [str(target["image_id"]) for _, targets in self.parts for target in targets]
        return f"step {self.number}, images {', '.join(images)}"


class Numbers:
    """Named scalars of all processes, on their way to the host."""

    def __init__(self, values: dict[str, Tensor], processes: Processes) -> None:
        self._names = list(values)
        self._own = torch.stack(list(values.values()))
        self._mean = HostCopy(processes.mean(self._own.clone()))

    def mean(self) -> dict[str, float]:
        """The means over all processes; waits for them."""
        return dict(zip(self._names, self._mean.tolist()))

    def own(self) -> dict[str, float]:
        """The values of this process alone."""
        return dict(zip(self._names, self._own.tolist()))


class Stopwatch:
    """How long steps take, loading included, and how much of that the teachers do."""

    def __init__(self, distiller: Distiller, device: torch.device) -> None:
        self._teachers = distiller.frozen_teachers if device.type == "cpu" else []  # elsewhere nobody waits for them
        self.restart()

    def restart(self) -> None:
        """Leave out what has happened since the last lap."""
        self._began, self._taught = time.perf_counter(), self._teachers_seconds()

    def lap(self) -> tuple[float, float]:
        """The seconds since the last lap, and those of them that the teachers took."""
        began, taught = self._began, self._taught
        self.restart()
        return self._began - began, self._taught - taught

    def _teachers_seconds(self) -> float:
        return sum(teacher.seconds for teacher in self._teachers)
