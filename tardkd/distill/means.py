"""One mean where several contribute to a term: several teachers, or several processes that train as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tardkd.ops import RegionLosses


def joint_region_losses(parts: Sequence[RegionLosses]) -> RegionLosses:
    """Sums over the regions of several teachers as one mean over the open gates of all; of one teacher, what it is."""
    if len(parts) == 1:
        return parts[0]
    gates, scores = (torch.cat([getattr(part, name) for part in parts]) for name in ("gates", "scores"))
    feature, classification, regression = (
        torch.stack([getattr(part, name) for part in parts]).sum() / count
        for name, count in zip(("feature", "classification", "regression"), gates.sum(0).clamp(min=1))
    )
    return RegionLosses(feature, classification, regression, gates, scores)


def joint_mean(parts: Sequence[Tensor], gates: Tensor) -> Tensor:
    """Sums () over the regions of several teachers as one mean over the open gates of all; of one, what it is.

    Args:
        parts: a scalar () of each teacher.
        gates: (R,) bool, of the regions of all teachers.
    """
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum() / gates.sum().clamp(min=1)


def joint_gaussian_loss(losses: Sequence[Tensor], objects: Sequence[Sequence[Tensor]]) -> Tensor:
    """The mean of the teachers' losses, weighted by their numbers of objects; of one teacher, what it is.

    Args:
        losses: a scalar () of each teacher.
        objects: of each teacher its boxes, N x (G, 4), as :meth:`FrozenTeacher.objects` has them; empty ones do not
            count.
    """
    if len(losses) == 1:
        return losses[0]
    boxes_by_teacher = [torch.cat(list(boxes)) for boxes in objects]
    counts = torch.stack([(boxes[:, 2:] > boxes[:, :2]).all(1).sum() for boxes in boxes_by_teacher])
    return (torch.stack(list(losses)) * counts).sum() / counts.sum().clamp(min=1)


def share_of_all(gates: Tensor) -> Tensor | None:
    """(3,) factors that turn this process's three means into its shares of the means over all processes.

    DistributedDataParallel averages gradients over processes, but a process with few open regions must count for few:
    with these factors, the mean over processes is the mean over the regions of all of them. None where there is one
    process.

    Args:
        gates: (R, 3) bool, the open gates of this process.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    counts = gates.sum(0).to(torch.float32)
    total = counts.clone()
    dist.all_reduce(total)
    return counts.clamp(min=1) * dist.get_world_size() / total.clamp(min=1)
