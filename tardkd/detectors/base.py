"""What tardkd needs of a detector, whatever its family.

Coordinates are pixels of the *student's* input unless said otherwise: of the image as the student's backbone sees it,
after its own resizing. In shapes, N counts images, R the regions of all images together, K classes, C channels, L the
levels of a pyramid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tardkd.ops.spec import Activation, Background, RoIAlignSpec, class_count, is_foreground

# The name that detectors' pooling had before the ops and the detectors shared one description of it.
RoISettings = RoIAlignSpec


@dataclass(frozen=True)
class HeadSettings:
    """How the outputs of a box head are to be read."""

    background: Background  # where the background stands among labels and softmax columns
    activation: Activation  # what turns logits into probabilities
    box_weights: tuple[float, float, float, float]  # of the box coder: dx, dy, dw, dh
    widths: tuple[int, int] | None  # columns of (logits, deltas); None where only a pass can tell


@dataclass
class HeadOutputs:
    """What a box head says about R regions."""

    logits: Tensor  # (R, K + 1), or (R, K) with sigmoid activation
    deltas: Tensor  # (R, 4) class-agnostic, or (R, 4K) or (R, 4(K + 1)) class-specific
    pooled: Tensor  # (R, C, p_h, p_w), what the head was given

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of (logits, deltas)."""
        return self.logits.shape[1], self.deltas.shape[1]

    def __getitem__(self, index: Tensor) -> HeadOutputs:
        """The outputs of the regions that ``index``, (R',) int64, names, in its order."""
        return HeadOutputs(self.logits[index], self.deltas[index], self.pooled[index])

    def cat(self, other: HeadOutputs) -> HeadOutputs:
        """These regions, then the other's."""
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
    gt_boxes: Tensor  # (R, 4) xyxy of the matched ground truth; the rows of background regions carry no meaning
    head: HeadOutputs

    @property
    def counts(self) -> list[int]:
        """How many regions each image has."""
        return [len(boxes) for boxes in self.proposals]

    def foreground(self, head: HeadSettings) -> Tensor:
        """(R,) bool: which regions have an object's label, by the conventions of ``head``, the student's."""
        num_classes = class_count(self.head.logits.shape[1], head.activation)
        return is_foreground(self.labels, head.background, num_classes)

    def select(self, keep: Tensor) -> Regions:
        """The regions where ``keep``, (R,) bool, is set, in the same order."""
        kept_counts = torch.stack([part.sum() for part in keep.split(self.counts)]).tolist()
        index = keep.nonzero().flatten()
        return Regions(
            list(torch.cat(self.proposals)[index].split(kept_counts)),
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
    mean: tuple[float, ...]  # of the normalisation, one value a channel
    std: tuple[float, ...]  # of the normalisation, one value a channel


@dataclass
class StudentPass:
    """One training forward of the student."""

    losses: dict[str, Tensor]  # scalars (), exactly what the detector itself returns
    inputs: InputBatch
    targets: list[dict[str, Tensor]]  # N dicts of ground truth: at least "boxes" (G, 4) xyxy and "labels" (G,) int64
    features: list[Tensor]  # L x (N, C, H_l, W_l), the levels that the box head pools from
    scales: list[float]  # of each level: feature pixels per student-input pixel
    regions: Regions  # the student's own sampled proposals


@dataclass
class TeacherPass:
    """Backbone and pyramid of the teacher; its head runs later, on the shared regions."""

    features: list[Tensor]  # L x (N, C, H_l, W_l), the levels that the box head pools from
    scales: list[float]  # of each level: teacher feature pixels per *student*-input pixel
    state: Any  # what the detector itself needs to go on from here


class Detector(Protocol):
    """A model in the role of student or teacher, through what all families of detectors have in common.

    The methods of the teacher are called under ``torch.no_grad()`` with the model in eval mode.
    """

    model: nn.Module

    @property
    def channels(self) -> int:
        """Channels of every pyramid level."""

    @property
    def input_size(self) -> float:
        """Nominal short side of the model's input in pixels; two models' quotient is their input ratio."""

    @property
    def roi(self) -> RoIAlignSpec:
        """How the box head pools a region."""

    @property
    def head(self) -> HeadSettings:
        """How the outputs of the box head are to be read."""

    def student_pass(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
        on_inputs: Callable[[InputBatch], None] = lambda inputs: None,
    ) -> StudentPass:
        """The model's own training forward, its losses untouched.

        Args:
            images: N x (3, H, W) in [0, 1], sizes may differ.
            targets: N dicts with "boxes" (G, 4) xyxy in pixels of the image, "labels" (G,) int64, and what else the
                model needs.
            on_inputs: called once, as soon as the batch exists that the backbone is going to see.
        """

    def student_regions(self, student_pass: StudentPass, proposals: list[Tensor]) -> Regions:
        """Label and sample ``proposals``, N x (P_n, 4) xyxy, by the student's rules, then run its head on them."""

    def teacher_pass(self, images: Sequence[Tensor], inputs: InputBatch, ratio: float) -> TeacherPass:
        """Backbone and pyramid on ``images``, N x (3, H, W) in [0, 1].

        They are resized to ``ratio`` times the size that they have in the student's ``inputs``.
        """

    def teacher_proposals(self, teacher_pass: TeacherPass) -> list[Tensor]:
        """The teacher's own proposals, N x (P_n, 4) xyxy, in student-input pixels."""

    def teacher_head(self, teacher_pass: TeacherPass, proposals: list[Tensor]) -> HeadOutputs:
        """The outputs of the box head on ``proposals``, N x (R_n, 4) xyxy in student-input pixels."""
