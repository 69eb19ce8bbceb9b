"""The distillation losses as a good engineer would write them with torchvision and PyTorch: what tardkd is timed against.

Vectorised over the regions, the teacher under ``no_grad``, no Python loop, nothing computed twice. The tests hold these
against tardkd, so a benchmark never compares two different things.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import MultiScaleRoIAlign

FEATURE_GATES = ("all", "foreground", "either")


class RegionDistill:
    """torchvision's ``MultiScaleRoIAlign`` on both pyramids, then the gated losses; softmax heads, background first."""

    def __init__(self, levels: int, output_size: int = 7, sampling_ratio: int = 2, feature_gate: str = "either") -> None:
        self.pool = MultiScaleRoIAlign([str(level) for level in range(levels)], output_size, sampling_ratio)
        self.feature_gate = feature_gate

    def pooled(self, features: Sequence[Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        return self.pool({str(level): feature for level, feature in enumerate(features)}, boxes, image_shapes)

    def __call__(
        self,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]],
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_deltas: Tensor,
        teacher_deltas: Tensor,
        labels: Tensor,
        gt_boxes: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(feature, classification, regression) losses, as ``region_distill_loss`` with its default options."""
        student_pooled = self.pooled(student_features, boxes, image_shapes)
        with torch.no_grad():
            teacher_pooled = self.pooled(teacher_features, boxes, image_shapes)
        heads = (student_logits, teacher_logits, student_deltas, teacher_deltas)
        return pooled_losses(
            student_pooled, teacher_pooled, torch.cat(boxes), *heads, labels, gt_boxes, feature_gate=self.feature_gate
        )


def pooled_losses(
    student_pooled: Tensor,
    teacher_pooled: Tensor,
    proposals: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_deltas: Tensor,
    teacher_deltas: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
    *,
    feature_gate: str = "either",
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses on (R, C, h, w) regions that are pooled already; proposals (R, 4)."""
    rows = torch.arange(len(labels), device=labels.device)
    student_own = student_deltas.view(len(labels), -1, 4)[rows, labels]
    with torch.no_grad():
        teacher_own = teacher_deltas.view(len(labels), -1, 4)[rows, labels]
        foreground = labels > 0
        better = teacher_logits.softmax(1)[rows, labels] > student_logits.softmax(1)[rows, labels]
        classification_gate = foreground & better
        decoded = BoxCoder((10.0, 10.0, 5.0, 5.0)).decode_single(teacher_own, proposals)
        regression_gate = foreground & (paired_iou(decoded, gt_boxes) > paired_iou(proposals, gt_boxes))
        gate = {
            "all": torch.ones_like(foreground),
            "foreground": foreground,
            "either": classification_gate | regression_gate,
        }[feature_gate]

    feature = (student_pooled - teacher_pooled).square().mean((1, 2, 3))
    divergence = F.kl_div(student_logits.log_softmax(1), teacher_logits.log_softmax(1), reduction="none", log_target=True)
    regression = F.smooth_l1_loss(student_own, teacher_own, reduction="none", beta=1 / 9).sum(1)
    return (
        gated_mean(feature, gate),
        gated_mean(divergence.sum(1), classification_gate),
        gated_mean(regression, regression_gate),
    )


def gated_mean(losses: Tensor, gate: Tensor) -> Tensor:
    return (losses * gate).sum() / gate.sum().clamp(min=1)


def paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of row i with row i."""
    overlap = (torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])).clamp(min=0)
    intersection = overlap.prod(1)
    union = (first[:, 2:] - first[:, :2]).prod(1) + (second[:, 2:] - second[:, :2]).prod(1) - intersection
    return intersection / union


def gaussian_feature_loss(
    student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], gt_boxes: Sequence[Tensor], scales: Sequence[float]
) -> Tensor:
    """The Gaussian-mask loss with a mask built by broadcasting over the boxes of an image."""
    total = 0.0
    for student, teacher, scale in zip(student_features, teacher_features, scales):
        y = torch.arange(student.shape[2], device=student.device)[None, :, None]
        x = torch.arange(student.shape[3], device=student.device)[None, None, :]
        masks = []
        for boxes in gt_boxes:
            x1, y1, x2, y2 = (boxes * scale)[:, :, None, None].unbind(1)
            exponent = ((x - (x1 + x2) / 2) / (x2 - x1) * math.sqrt(2)).square()
            exponent = exponent + ((y - (y1 + y2) / 2) / (y2 - y1) * math.sqrt(2)).square()
            inside = (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)
            masks.append(torch.where(inside, (-exponent).exp(), 0.0).amax(0))
        mask = torch.stack(masks)
        squared = ((student - teacher).square().sum(1) * mask).sum()
        total = total + squared / (2 * mask.sum().clamp(min=1))
    return total / len(scales)
