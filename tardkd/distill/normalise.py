"""Means over the open regions of all processes, where several train as one."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def share_of_all(gates: Tensor) -> Tensor | None:
    """What to multiply this process's three means by, so that the mean over processes is that over all their regions.

    DistributedDataParallel averages gradients over processes; a process with few open regions must count for few. None
    where there is one process.

    Args:
        gates: (R, 3) bool, the open gates of this process.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    counts = gates.sum(0).to(torch.float32)
    total = counts.clone()
    dist.all_reduce(total)
    return counts.clamp(min=1) * dist.get_world_size() / total.clamp(min=1)
