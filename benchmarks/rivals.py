"""The losses as a good engineer would write them with torchvision and PyTorch: what tardkd is timed against.

Vectorised over the regions, the teacher under ``no_grad``, no Python loop over regions, nothing computed twice.
Everything here may be passed to :func:`torch.compile`. What tardkd has too is compared with it before it is timed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import MultiScaleRoIAlign

FEATURE_GATES = ("all", "foreground", "either")

Losses = tuple[Tensor, Tensor, Tensor]  # feature, classification, regression


# --- over shared regions -------------------------------------------------------------------------------------------


class Pool:
    """torchvision's ``MultiScaleRoIAlign`` on a list of maps."""

    def __init__(self, levels: int, output_size: int = 7, sampling_ratio: int = 2) -> None:
        self.module = MultiScaleRoIAlign([str(level) for level in range(levels)], output_size, sampling_ratio)

    def __call__(self, features: Sequence[Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        return self.module({str(level): feature for level, feature in enumerate(features)}, boxes, image_shapes)


class RegionDistill:
    """Both pyramids pooled by torchvision, then the gated losses; softmax heads, background first.

    Args:
        filtered: decide the gates first and pool only the regions whose feature gate is open. This waits for the GPU.
        subtracted: subtract the maps, then pool once: RoIAlign is linear, where both sides have the same geometry.
    """

    def __init__(
        self, levels: int, feature_gate: str = "either", *, filtered: bool = False, subtracted: bool = False
    ) -> None:
        self.pool = Pool(levels)
        self.feature_gate, self.filtered, self.subtracted = feature_gate, filtered, subtracted

    def __call__(
        self,
        student_features: Sequence[Tensor],
        teacher_features: Sequence[Tensor],
        boxes: list[Tensor],
        image_shapes: list[tuple[int, int]],
        *per_region: Tensor,
    ) -> Losses:
        """As ``region_distill_loss`` with its default options; ``per_region`` as in :func:`head_terms`."""
        heads = head_terms(torch.cat(boxes), *per_region)
        gate = heads.feature_gate(self.feature_gate)
        if self.filtered:
            opened = gate.split([len(boxes_of_image) for boxes_of_image in boxes])
            boxes = [boxes_of_image[rows] for boxes_of_image, rows in zip(boxes, opened)]
        if self.subtracted:
            maps = [student - teacher for student, teacher in zip(student_features, teacher_features)]
            distances = self.pool(maps, boxes, image_shapes)
        else:
            student_pooled = self.pool(student_features, boxes, image_shapes)
            with torch.no_grad():
                teacher_pooled = self.pool(teacher_features, boxes, image_shapes)
            distances = student_pooled - teacher_pooled
        return feature_loss(distances, gate, self.filtered), *heads.losses()


def pooled_losses(
    student_pooled: Tensor,
    teacher_pooled: Tensor,
    proposals: Tensor,
    *per_region: Tensor,
    feature_gate: str = "either",
    filtered: bool = False,
) -> Losses:
    """The losses on (R, C, h, w) regions that are pooled already; proposals (R, 4)."""
    heads = head_terms(proposals, *per_region)
    gate = heads.feature_gate(feature_gate)
    if filtered:
        student_pooled, teacher_pooled = student_pooled[gate], teacher_pooled[gate]
    return feature_loss(student_pooled - teacher_pooled, gate, filtered), *heads.losses()


def feature_loss(distances: Tensor, gate: Tensor, filtered: bool) -> Tensor:
    """``distances``: (R, C, h, w), or of the open regions alone if ``filtered``. Accumulates in float32."""
    squared = distances.square().mean((1, 2, 3), dtype=torch.float32)
    return squared.sum() / gate.sum().clamp(min=1) if filtered else gated_mean(squared, gate)


class HeadTerms(NamedTuple):
    """What the two models' heads give for each of the R regions."""

    divergence: Tensor  # (R,) KL(teacher || student)
    distance: Tensor  # (R,) smooth L1 of the deltas of the region's class, summed over the four
    foreground: Tensor  # (R,) bool
    classification_gate: Tensor
    regression_gate: Tensor

    def feature_gate(self, name: str) -> Tensor:
        if name == "all":
            return torch.ones_like(self.foreground)
        return self.foreground if name == "foreground" else self.classification_gate | self.regression_gate

    def losses(self) -> tuple[Tensor, Tensor]:
        """(classification, regression)."""
        return gated_mean(self.divergence, self.classification_gate), gated_mean(self.distance, self.regression_gate)


def head_terms(
    proposals: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_deltas: Tensor,
    teacher_deltas: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
) -> HeadTerms:
    """Proposals and gt_boxes (R, 4), logits (R, K + 1), deltas (R, 4 (K + 1)), labels (R,). In float32."""
    rows = torch.arange(len(labels), device=labels.device)
    student_own = student_deltas.view(len(labels), -1, 4)[rows, labels].float()
    student_log = student_logits.log_softmax(1, dtype=torch.float32)
    with torch.no_grad():
        teacher_own = teacher_deltas.view(len(labels), -1, 4)[rows, labels].float()
        teacher_log = teacher_logits.log_softmax(1, dtype=torch.float32)
        foreground = labels > 0
        decoded = BoxCoder((10.0, 10.0, 5.0, 5.0)).decode_single(teacher_own, proposals)
        classification_gate = foreground & (teacher_log[rows, labels] > student_log[rows, labels])
        regression_gate = foreground & (paired_iou(decoded, gt_boxes) > paired_iou(proposals, gt_boxes))
    return HeadTerms(
        F.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(1),
        F.smooth_l1_loss(student_own, teacher_own, reduction="none", beta=1 / 9).sum(1),
        foreground,
        classification_gate,
        regression_gate,
    )


def gated_mean(losses: Tensor, gate: Tensor) -> Tensor:
    return (losses * gate).sum() / gate.sum().clamp(min=1)


def paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of row i with row i."""
    overlap = (torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])).clamp(min=0)
    intersection = overlap.prod(1)
    union = (first[:, 2:] - first[:, :2]).prod(1) + (second[:, 2:] - second[:, :2]).prod(1) - intersection
    return intersection / union


# --- over whole maps -----------------------------------------------------------------------------------------------


def gaussian_feature_loss(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    gt_boxes: Sequence[Tensor],
    scales: Sequence[float],
) -> Tensor:
    """The Gaussian-mask loss: a box's mask is a product of one factor an axis, an image's the maximum over boxes."""

    def factors(low: Tensor, high: Tensor, length: int) -> Tensor:
        """(G, length): the Gaussian of [low, high], zero outside."""
        position = torch.arange(length, device=low.device)
        low, high = low[:, None], high[:, None]
        exponent = ((position - (low + high) / 2) / (high - low) * math.sqrt(2)).square()
        return torch.where((position >= low) & (position <= high), (-exponent).exp(), 0.0)

    total = 0.0
    for student, teacher, scale in zip(student_features, teacher_features, scales):
        height, width = student.shape[2:]
        masks = []
        for boxes in gt_boxes:
            x1, y1, x2, y2 = (boxes * scale).unbind(1)
            masks.append((factors(y1, y2, height)[:, :, None] * factors(x1, x2, width)[:, None, :]).amax(0))
        mask = torch.stack(masks)
        squared = (student - teacher).square().sum(1, dtype=torch.float32)
        total = total + (squared * mask).sum() / (2 * mask.sum().clamp(min=1))
    return total / len(scales)


def imitation_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Plain imitation of whole maps: their mean squared difference, mean over levels."""
    return sum(F.mse_loss(s, t) for s, t in zip(student_features, teacher_features)) / len(student_features)


def correlation_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """Half the mean squared difference of maps standardised channel by channel (as PKD), mean over levels."""

    def standardised(feature: Tensor) -> Tensor:
        feature = feature.float()
        deviation, mean = torch.std_mean(feature, (0, 2, 3), keepdim=True)
        return (feature - mean) / (deviation + 1e-6)

    total = 0.0
    for student, teacher in zip(student_features, teacher_features):
        with torch.no_grad():
            target = standardised(teacher)
        total = total + F.mse_loss(standardised(student), target) / 2
    return total / len(student_features)
