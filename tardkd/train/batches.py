"""The batches of a run: whose turn which images are, depending on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from tardkd.data.loader import aspect_groups, build_loader
from tardkd.train.config import Config, ConfigError
from tardkd.train.distributed import Processes

Part = tuple[
    list[Tensor], list[dict[str, Any]]
]  # images N x (3, H, W) and targets: what goes through the models at once


def build_batches(
    config: Config, dataset: Any, *, epoch: int | None = None, first_batch: int = 0, processes: Processes | None = None
) -> Iterable[Part]:
    """This process's share of the training batches of `epoch` from `first_batch` on, or of the data set in order."""
    train, processes = config.train, processes or Processes()
    if train.batch_size % (processes.count * train.accumulate):
        raise ConfigError(
            f"train.batch_size {train.batch_size} does not divide into {processes.count} processes times "
            f"train.accumulate {train.accumulate}"
        )
    groups = aspect_groups(dataset.sizes) if epoch is not None and train.group_by_aspect else None
    return build_loader(
        dataset,
        groups=groups,
        batch_size=train.batch_size,
        shuffle=epoch is not None,
        seed=train.seed,
        epoch=epoch or 0,
        workers=train.workers,
        first_batch=first_batch,
        rank=processes.rank,
        processes=processes.count,
        parts=train.accumulate,
        pin_memory=processes.device.type == "cuda",
    )


def by_step(parts: Iterable[Part], accumulate: int) -> Iterator[tuple[Part, ...]]:
    """The parts that make up each step; what does not fill a last one is left out."""
    return zip(*[iter(parts)] * accumulate)
