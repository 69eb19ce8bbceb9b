"""What tardkd needs of a detector, whatever its family.

Coordinates are pixels of the *student's* input unless said otherwise: the image as the student's backbone
sees it, after its own resizing. N images, R regions of all images together, K classes, C channels, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RoISettings:
    """How the box head pools a region; the fields carry torchvision's names and meaning."""

    output_size: tuple[int, int]
    sampling_ratio: int
    aligned: bool
    canonical_scale: float
    canonical_level: int


@dataclass(frozen=True)
class HeadSettings:
    """How the outputs of the box head are to be read."""

    background: str  # index of the background class: "first" or "last"
    activation: str  # "softmax" or "sigmoid"
    box_weights: tuple[float, float, float, float]
    widths: tuple[int, int] | None  # columns of (logits, deltas); None where only a pass can tell


@dataclass
class HeadOutputs:
    """What a box head says about R regions."""

    logits: Tensor  # (R, K+1), or (R, K) with sigmoid activation
    deltas: Tensor  # (R, 4) class-agnostic, or (R, 4 * classes)
    pooled: Tensor  # (R, C, p, p) what the head was given

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of (logits, deltas)."""
        return self.logits.shape[1], self.deltas.shape[1]

    def __getitem__(self, index: Tensor) -> HeadOutputs:
        return HeadOutputs(self.logits[index], self.deltas[index], self.pooled[index])

    def cat(self, other: HeadOutputs) -> HeadOutputs:
        return HeadOutputs(
            torch.cat([self.logits, other.logits]),
            torch.cat([self.deltas, other.deltas]),
            torch.cat([self.pooled, other.pooled]),
        )


@dataclass
class Regions:
    """Labelled proposals and what the student's head says about them; rows are grouped by image."""

    proposals: list[Tensor]  # N x (R_n, 4) xyxy
    labels: Tensor  # (R,) int64
    gt_boxes: Tensor  # (R, 4) matched ground truth; background rows carry no meaning
    head: HeadOutputs

    @property
    def counts(self) -> list[int]:
        return [len(boxes) for boxes in self.proposals]

    def select(self, keep: Tensor) -> Regions:
        """The regions where ``keep`` (R,) bool is set, in the same order."""
        kept = torch.stack([part.sum() for part in keep.split(self.counts)]).tolist()
        index = keep.nonzero().flatten()
        return Regions(
            list(torch.cat(self.proposals)[index].split(kept)),
            self.labels[index],
            self.gt_boxes[index],
            self.head[index],
        )

    def union(self, other: Regions) -> Regions:
        """Both sets together: in each image first these regions, then the other's."""
        images = torch.arange(len(self.proposals)).repeat(2)
        image_of_row = images.repeat_interleave(torch.tensor(self.counts + other.counts))
        order = image_of_row.argsort(stable=True).to(self.labels.device)
        return Regions(
            [torch.cat(pair) for pair in zip(self.proposals, other.proposals)],
            torch.cat([self.labels, other.labels])[order],
            torch.cat([self.gt_boxes, other.gt_boxes])[order],
            self.head.cat(other.head)[order],
        )


@dataclass
class InputBatch:
    """Images as a backbone takes them: resized, normalised, padded at the right and the bottom."""

    tensor: Tensor  # (N, 3, H, W)
    sizes: list[tuple[int, int]]  # (height, width) of each image inside the padding
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass
class StudentPass:
    """One training forward of the student."""

    losses: dict[str, Tensor]  # exactly what the detector itself returns
    inputs: InputBatch
    targets: list[dict[str, Tensor]]  # ground truth in student-input pixels: at least "boxes" and "labels"
    features: list[Tensor]  # L x (N, C, H_l, W_l), the levels that the box head pools from
    scales: list[float]  # per level: feature pixels per student-input pixel
    regions: Regions  # the student's own sampled proposals


@dataclass
class TeacherPass:
    """Backbone and pyramid of the teacher; its head runs later, on the shared regions."""

    features: list[Tensor]
    scales: list[float]  # per level: teacher feature pixels per *student*-input pixel
    state: Any  # what the adapter itself needs to go on from here


class DetectorAdapter(Protocol):
    """One detector in the role of student or teacher.

    Teacher methods are called under ``torch.no_grad()`` with the model in eval mode.
    """

    model: nn.Module

    @property
    def channels(self) -> int:
        """Channels of every pyramid level."""

    @property
    def input_size(self) -> float:
        """Nominal short side of the model's input in pixels; two models' quotient is their input ratio."""

    @property
    def roi(self) -> RoISettings: ...

    @property
    def head(self) -> HeadSettings: ...

    def student_pass(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
        on_inputs: Callable[[InputBatch], None] = lambda inputs: None,
    ) -> StudentPass:
        """The model's own training forward, its losses untouched.

        ``on_inputs`` is called once, as soon as the batch exists that the backbone is going to see.
        """

    def student_regions(self, student: StudentPass, proposals: list[Tensor]) -> Regions:
        """Label and sample ``proposals`` (N x (P_n, 4)) by the student's rules, then run its head on them."""

    def teacher_pass(self, images: Sequence[Tensor], inputs: InputBatch, ratio: float) -> TeacherPass:
        """Backbone and pyramid at ``ratio`` times the size of the student's ``inputs``."""

    def teacher_proposals(self, teacher: TeacherPass) -> list[Tensor]:
        """The teacher's own proposals, N x (P_n, 4), in student-input pixels."""

    def teacher_head(self, teacher: TeacherPass, proposals: list[Tensor]) -> HeadOutputs:
        """The box head on ``proposals`` (N x (R_n, 4), student-input pixels)."""
