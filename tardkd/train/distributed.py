"""Several processes that train as one, as torchrun starts them; a single process is the case of one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tardkd.train.config import ConfigError

# The first process computes the average precision while the others wait; that of a process which failed is ended by
# torchrun, not by this.
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Processes:
    """This process among all that take part, and the device that it works on."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, computed in place and on the device; the host does not wait."""
        if self.count > 1:
            dist.all_reduce(values)
            values /= self.count
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """The first process's value."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with those of the first process."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Take part in the group that torchrun describes in the environment, on `device`: "auto", "cpu" or "cuda"."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(device=pick_device(device))
        return
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Processes(dist.get_rank(), count, chosen)
    finally:
        dist.destroy_process_group()


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device called "auto", "cpu" or "cuda"; the GPU is that of this process's number on its machine."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but torch finds no CUDA device")
    if local_rank is None:
        return torch.device("cuda")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(f"process {local_rank} of this machine has no GPU: torch finds {torch.cuda.device_count()}")
    return torch.device("cuda", local_rank)
