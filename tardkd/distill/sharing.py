"""Region proposal sharing: region i is the same box in all models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tardkd.detectors import DetectorAdapter
from tardkd.detectors.base import HeadSettings, Regions, StudentPass, TeacherPass
from tardkd.ops import RegionLosses

from .settings import DistillSettings


def share_regions(
    student_adapter: DetectorAdapter,
    student: StudentPass,
    teachers: Sequence[tuple[DetectorAdapter, TeacherPass]],
    settings: DistillSettings,
) -> Regions:
    """The regions that all models look at, with the student's head on them.

    The proposals of several teachers are put together, before the student's rules sample from them. Where no term looks
    at background, the teachers' heads are spared it.
    """
    regions = student.regions
    if settings.sharing != "student":
        with torch.no_grad():
            proposals = [adapter.teacher_proposals(seen) for adapter, seen in teachers]
        by_image = [torch.cat(boxes) for boxes in zip(*proposals)]
        theirs = student_adapter.student_regions(student, by_image)
        regions = theirs if settings.sharing == "teacher" else regions.union(theirs)
    if settings.foreground_only:
        regions = regions.select(foreground(regions.labels, regions.head.logits, student_adapter.head))
    return regions


def foreground(labels: Tensor, logits: Tensor, head: HeadSettings) -> Tensor:
    """(R,) bool: which regions have an object's label."""
    columns = logits.shape[1] - (head.activation == "softmax")
    return labels != (0 if head.background == "first" else columns)


def rescale_deltas(deltas: Tensor, weights: Sequence[float], wanted: Sequence[float]) -> Tensor:
    """Deltas (R, 4k) of a box coder with ``weights`` as one with ``wanted`` would have written them."""
    if tuple(weights) == tuple(wanted):
        return deltas
    factor = deltas.new_tensor(wanted) / deltas.new_tensor(weights)
    return (deltas.unflatten(1, (-1, 4)) * factor).flatten(1)


def region_stats(losses: RegionLosses, is_foreground: Tensor) -> dict[str, Tensor]:
    """What the gates decided and why: means over the foreground regions, and their number."""
    count = is_foreground.sum()

    def mean(values: Tensor) -> Tensor:
        return (values * is_foreground).sum() / count.clamp(min=1)

    names = ("gate_feature", "gate_classification", "gate_regression")
    scores = ("teacher_score", "student_score", "teacher_iou", "other_iou")
    return {
        "foreground": count,
        **{name: mean(column) for name, column in zip(names, losses.gates.unbind(1))},
        **{name: mean(column) for name, column in zip(scores, losses.scores.unbind(1))},
    }
