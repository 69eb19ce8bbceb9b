"""The run that is examined, as far as it could be built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tardkd.data import to_float
from tardkd.distill import Distiller
from tardkd.train.config import Config
from tardkd.train.update import DTYPES

PARTS = {
    "config": "a configuration",
    "train_set": "training data",
    "val_set": "validation data",
    "distiller": "a model",
}


@dataclass
class Subject:
    """What is None could not be built. `train_set` has the training's random views."""

    images: int  # how many of a split a check may look into
    thorough: bool  # open all images
    config: Config | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    train_set: Any = None
    val_set: Any = None
    distiller: Distiller | None = None
    evaluation: float | None = None  # seconds an image

    def lacks(self, needs: tuple[str, ...]) -> str:
        """What of `needs` is not there, in words; empty where all is."""
        return " and ".join(PARTS[name] for name in needs if getattr(self, name) is None)

    def sample(self, dataset: Any) -> list[int]:
        """Indices of at most `images` images, spread over the data set: neighbours are often alike."""
        count = len(dataset)
        return torch.linspace(0, count - 1, min(count, self.images)).long().tolist()

    def to_device(self, batch: tuple[list[Tensor], list[dict[str, Any]]]) -> tuple[list[Tensor], list[dict[str, Any]]]:
        images, targets = batch
        return (
            to_float(images, self.device),
            [
                {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in target.items()}
                for target in targets
            ],
        )

    def autocast(self) -> torch.autocast:
        amp = self.config.train.amp
        return torch.autocast(self.device.type, DTYPES.get(amp), enabled=amp in DTYPES)
