"""The run that is examined, as far as it could be built."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from tardkd.distill import Distiller
from tardkd.train.batches import build_batches
from tardkd.train.config import Config
from tardkd.train.distributed import Processes
from tardkd.train.update import Update

PARTS = {
    "config": "a configuration",
    "train_set": "training data",
    "val_set": "validation data",
    "distiller": "a model",
}


@dataclass
class Subject:
    """The parts of a run. Each is None until a check has built it, and stays so where that was not possible."""

    images: int  # how many images of a split a check may open
    thorough: bool  # whether all images are opened
    config: Config | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    train_set: Any = None  # with the random views of the training
    val_set: Any = None
    distiller: Distiller | None = None
    evaluation: float | None = None  # how many seconds it takes to evaluate the student on one image

    def lacks(self, needs: tuple[str, ...]) -> str:
        """Which of the parts `needs` are not there, in words; empty where all are."""
        return " and ".join(PARTS[name] for name in needs if getattr(self, name) is None)

    def sample(self, dataset: Any) -> list[int]:
        """Indices of at most `images` images, spread over the data set: neighbours are often alike."""
        count = len(dataset)
        return torch.linspace(0, count - 1, min(count, self.images)).long().tolist()

    @cached_property
    def update(self) -> Update:
        """The training step of the run, which the checks take as the run would."""
        return Update(self.config, self.distiller, self.processes)

    @property
    def processes(self) -> Processes:
        """This one process alone, on the device of the run."""
        return Processes(device=self.device)

    def batches(self) -> Any:
        """The batches of the first epoch, in parts."""
        return build_batches(self.config, self.train_set, epoch=0, processes=self.processes)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.batches()) // self.config.train.accumulate
