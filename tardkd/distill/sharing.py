"""Region proposal sharing: region i is the same box in all models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from tardkd.detectors import Detector
from tardkd.detectors.base import Regions, StudentPass, TeacherPass
from tardkd.ops import RegionLosses

from .settings import DistillSettings


def share_regions(
    student: Detector,
    student_pass: StudentPass,
    teachers: Sequence[tuple[Detector, TeacherPass]],
    settings: DistillSettings,
) -> Regions:
    """The regions that all models look at, with the outputs of the student's head on them.

    The proposals of several teachers are put together before the student's rules sample from them. Where no term looks
    at the background, it is left out, so that the teachers' heads need not run on it.
    """
    regions = student_pass.regions
    if settings.sharing != "student":
        with torch.no_grad():
            proposals = [teacher.teacher_proposals(teacher_pass) for teacher, teacher_pass in teachers]
        by_image = [torch.cat(boxes) for boxes in zip(*proposals)]
        proposed = student.student_regions(student_pass, by_image)
        regions = proposed if settings.sharing == "teacher" else regions.union(proposed)
    if settings.foreground_only:
        regions = regions.select(regions.foreground(student.head))
    return regions


def nearest_proposals(regions: Regions, proposals: Sequence[Tensor]) -> list[Tensor]:
    """For each region the proposal that overlaps its object most, N x (R_n, 4) xyxy.

    Args:
        regions: the student's; each is of an object.
        proposals: N x (P_n, 4) xyxy; of an image without any, the objects are taken themselves.
    """
    return [
        of_image[box_iou(objects, of_image).argmax(1)] if len(of_image) else objects
        for objects, of_image in zip(regions.gt_boxes.split(regions.counts), proposals)
    ]


def rescale_deltas(deltas: Tensor, weights: Sequence[float], wanted: Sequence[float]) -> Tensor:
    """Deltas, (R, 4k), of a box coder with ``weights`` as one with the ``wanted`` weights would have written them."""
    if tuple(weights) == tuple(wanted):
        return deltas
    factor = deltas.new_tensor(wanted) / deltas.new_tensor(weights)
    return (deltas.unflatten(1, (-1, 4)) * factor).flatten(1)


def region_stats(losses: RegionLosses, foreground: Tensor) -> dict[str, Tensor]:
    """What the gates decided and why: the number of foreground regions, and means over them, scalars ().

    Args:
        foreground: (R,) bool, which regions have an object.
    """
    count = foreground.sum()

    def mean(values: Tensor) -> Tensor:
        return (values * foreground).sum() / count.clamp(min=1)

    gates = ("gate_feature", "gate_classification", "gate_regression")
    scores = ("teacher_score", "student_score", "teacher_iou", "other_iou")
    return {
        "foreground": count,
        **{name: mean(column) for name, column in zip(gates, losses.gates.unbind(1))},
        **{name: mean(column) for name, column in zip(scores, losses.scores.unbind(1))},
    }
