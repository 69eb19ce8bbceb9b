"""CrossKD (Wang et al. 2024), which looks into the heads of two RetinaNets; ``literature`` has losses that do not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.ops import generalized_box_iou_loss

from tardkd.detectors import for_model
from tardkd.detectors.base import StudentPass, TeacherPass
from tardkd.distill.adapters import make_adapter

from .anchors import level_anchors

REUSED = 3  # convolutions of the student's head that the teacher's head takes over from, as its authors have it


class CrossKD(nn.Module):
    """The student's head, ended by the teacher's, is to say what the teacher's head says of its own maps.

    What the student's first convolutions say is brought to the mean and deviation that each channel of the teacher's
    has, and goes on through the teacher's frozen rest of the head. Classes: a focal binary cross-entropy with the
    teacher's probabilities, weighted by the difference of the two. Boxes: 1 - GIoU, weighted by the teacher's largest
    probability. Both are sums over all anchors, divided by the number of the student's positive ones. Where heads
    differ in channels, a 1x1 convolution is put between.

    Raises:
        ValueError: one of the models is no RetinaNet, or their levels or anchors differ.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        if not (isinstance(student, RetinaNet) and isinstance(teacher, RetinaNet)):
            raise ValueError(f"crosskd needs two RetinaNets: {type(student).__name__} and {type(teacher).__name__}")
        strides = for_model(student).strides, for_model(teacher).strides
        counts = [model.head.classification_head.num_anchors for model in (student, teacher)]
        if strides[0] != strides[1] or counts[0] != counts[1]:
            raise ValueError(f"crosskd compares the same anchors: strides {strides}, anchors a place {counts}")
        # Outside the modules: these parameters are the student's own, and the teacher's, which stay as they are.
        self._models = (student, teacher)
        branches = zip(_branches(student), _branches(teacher))
        like = next(student.parameters())
        self.adapters = nn.ModuleList(
            make_adapter(ours[0][0].in_channels, theirs[0][0].in_channels, like) for (ours, _), (theirs, _) in branches
        )

    def forward(self, student_pass: StudentPass, teacher_pass: TeacherPass) -> Tensor:
        student, teacher = self._models
        total = student_pass.features[0].new_zeros(())
        anchors = level_anchors(student, student_pass.inputs, student_pass.features)
        count = (student_pass.regions.labels > 0).sum().clamp(min=1)
        for of_level, own, other in zip(anchors, student_pass.features, teacher_pass.features, strict=True):
            (answer, reused), (answered_deltas, reused_deltas) = (
                self._answers(ours, theirs, adapt, own, other)
                for ours, theirs, adapt in zip(_branches(student), _branches(teacher), self.adapters)
            )
            k = teacher.head.classification_head.num_classes
            target, logits = (_by_anchor(maps, k) for maps in (answer.sigmoid(), reused))
            distance = (logits.sigmoid() - target).abs()
            classes = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * distance
            flat = of_level.expand(len(own), *of_level.shape).reshape(-1, 4)
            boxes, wanted = (
                teacher.box_coder.decode_single(_by_anchor(maps, 4), flat) for maps in (reused_deltas, answered_deltas)
            )
            overlaps = generalized_box_iou_loss(boxes, wanted) * target.amax(1)
            total = total + classes.sum() + overlaps.sum()
        return self.weight * total / count

    @staticmethod
    def _answers(
        ours: tuple[nn.Sequential, nn.Conv2d],
        theirs: tuple[nn.Sequential, nn.Conv2d],
        adapt: nn.Module,
        own: Tensor,
        other: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What the teacher's branch says of its map, and of the student's, each (N, A k, H, W)."""
        with torch.no_grad():
            held = _begin(theirs[0], other)
            answer = _end(*theirs, held)
        begun = adapt(_begin(ours[0], own))
        deviation, mean = torch.std_mean(begun, (0, 2, 3), keepdim=True)
        to_deviation, to_mean = torch.std_mean(held, (0, 2, 3), keepdim=True)
        return answer, _end(*theirs, (begun - mean) / (deviation + 1e-6) * to_deviation + to_mean)


def _branches(model: RetinaNet) -> list[tuple[nn.Sequential, nn.Conv2d]]:
    """The convolutions and the last one, of classes and of boxes."""
    classes, boxes = model.head.classification_head, model.head.regression_head
    return [(classes.conv, classes.cls_logits), (boxes.conv, boxes.bbox_reg)]


def _begin(convolutions: nn.Sequential, maps: Tensor) -> Tensor:
    """What the first ones say, without the last activation."""
    *layers, _ = convolutions[REUSED - 1]
    return nn.Sequential(*convolutions[: REUSED - 1], *layers)(maps)


def _end(convolutions: nn.Sequential, last: nn.Conv2d, held: Tensor) -> Tensor:
    return last(convolutions[REUSED:](held.relu()))


def _by_anchor(maps: Tensor, width: int) -> Tensor:
    """(N, A width, H, W) as (N H W A, width)."""
    return maps.unflatten(1, (-1, width)).permute(0, 3, 4, 1, 2).reshape(-1, width)
