"""Region proposal sharing: region i is the same box in both models."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from tardkd.detectors import DetectorAdapter
from tardkd.detectors.base import HeadOutputs, HeadSettings, Regions, StudentPass, TeacherPass
from tardkd.ops import RegionLosses

from .settings import DistillSettings


def share_regions(
    student_adapter: DetectorAdapter,
    teacher_adapter: DetectorAdapter,
    student: StudentPass,
    teacher: TeacherPass,
    settings: DistillSettings,
) -> tuple[Regions, HeadOutputs]:
    """The regions of both models with the student's head, and the teacher's head on the same.

    Where no term looks at background, the teacher's head is spared it.
    """
    regions = student.regions
    if settings.sharing != "student":
        with torch.no_grad():
            proposals = teacher_adapter.teacher_proposals(teacher)
        theirs = student_adapter.student_regions(student, proposals)
        regions = theirs if settings.sharing == "teacher" else regions.union(theirs)
    if settings.foreground_only:
        regions = regions.select(foreground(regions.labels, regions.head.logits, student_adapter.head))
    with torch.no_grad():
        head = teacher_adapter.teacher_head(teacher, regions.proposals)
    return regions, head


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
