"""What tardkd needs of a detector, whatever its family: the student names regions, a teacher answers for them.

A region is a box with a class. The student's own training step names them: sampled proposals, positive anchors,
assigned points or matched queries. A teacher of any family is then asked what it says of the very same regions.

Coordinates are pixels of the *student's* input unless said otherwise: of the image as the student's backbone sees it,
after its own resizing. In shapes, N counts images, R the regions of all images together, K classes, C channels, L the
levels of a pyramid.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tardkd.detectors.anchors import Anchors
from tardkd.ops import FeatureTap
from tardkd.ops.spec import Activation, Background, BoxCoding, RoIAlignSpec, class_count, is_foreground

# The name that detectors' pooling had before the ops and the detectors shared one description of it.
RoISettings = RoIAlignSpec

RegionKind = Literal["proposals", "objects", "anchors"]

Detections = dict[str, Tensor]  # of one image: "boxes" (D, 4) xyxy in its pixels, "labels" (D,) int64, "scores" (D,)


@dataclass(frozen=True)
class HeadSettings:
    """How the outputs of a head are to be read."""

    background: Background  # where the background stands among labels and softmax columns
    activation: Activation  # what turns logits into probabilities
    box_weights: tuple[float, float, float, float]  # of the box coder: dx, dy, dw, dh
    widths: tuple[int, int] | None  # columns of (logits, boxes); None where only a pass can tell
    box_coding: BoxCoding = "deltas"  # what the head says of a box: deltas to the region, or a box of its own
    # What the regions of a student of this family are: its own proposals; anchors, which stood there before it looked;
    # or, for points and queries, which have no box, the objects that they were assigned to.
    regions: RegionKind = "proposals"
    bins: int | None = None  # of its distribution over where each side of a box is; None: it has no distributions

    @property
    def num_classes(self) -> int | None:
        """K, without the background; None where only a pass can tell."""
        return None if self.widths is None else class_count(self.widths[0], self.activation)


@dataclass
class Sides:
    """Distributions over where the four sides of R boxes are, of a head that says more of a box than its corners.

    Heads with a distribution focal loss have them, such as YOLOv8's and YOLOv9's, and D-FINE's.
    """

    logits: Tensor  # (R, 4, bins) of the left, top, right and bottom side
    # (R, 4, bins) where each bin has the side: student-input pixels, rising outwards: -x of the left side, -y of the
    # top, x of the right, y of the bottom. Two heads may have their bins in other places.
    places: Tensor

    def __getitem__(self, index: Tensor) -> Sides:
        """Those of the regions that ``index``, (R',) int64, names, in its order."""
        return Sides(self.logits[index], self.places[index])


@dataclass
class HeadOutputs:
    """What a head says about R regions."""

    logits: Tensor  # (R, K + 1), or (R, K) with sigmoid activation
    # By the head's box coding: deltas, (R, 4) class-agnostic, (R, 4K) or (R, 4(K + 1)) class-specific; or boxes, (R, 4)
    # xyxy.
    boxes: Tensor
    pooled: Tensor | None = None  # (R, C, p_h, p_w), what a box head was given; None of a head that pools nothing
    quality: Tensor | None = None  # (R,) in [0, 1], what else the head thinks of its box, such as FCOS's centerness
    sides: Sides | None = None  # of a head that has distributions

    @property
    def widths(self) -> tuple[int, int]:
        """Columns of (logits, boxes)."""
        return self.logits.shape[1], self.boxes.shape[1]

    def __getitem__(self, index: Tensor) -> HeadOutputs:
        """The outputs of the regions that ``index``, (R',) int64, names, in its order."""
        pooled = None if self.pooled is None else self.pooled[index]
        quality = None if self.quality is None else self.quality[index]
        sides = None if self.sides is None else self.sides[index]
        return HeadOutputs(self.logits[index], self.boxes[index], pooled, quality, sides)

    def cat(self, other: HeadOutputs) -> HeadOutputs:
        """These regions, then the other's."""
        return HeadOutputs(
            torch.cat([self.logits, other.logits]),
            torch.cat([self.boxes, other.boxes]),
            _cat(self.pooled, other.pooled),
            _cat(self.quality, other.quality),
        )


@dataclass
class Regions:
    """Labelled regions and what the student's head says about them; rows are grouped by image."""

    proposals: list[Tensor]  # N x (R_n, 4) xyxy, the boxes P_i
    labels: Tensor  # (R,) int64
    gt_boxes: Tensor  # (R, 4) xyxy of the matched ground truth; the rows of background regions carry no meaning
    head: HeadOutputs
    levels: Tensor | None = None  # (R,) int64, of the student's pyramid that a region stands on; None: by its size
    weights: Tensor | None = None  # (R,) how much a region counts; None: all alike
    rows: Tensor | None = None  # (R,) int64, the head's rows of the region's image where it answers for all of a grid
    # What `rows` counts: a teacher whose pass has an equal grid answers with the same rows. Its type is the family's.
    grid: Any = field(default=None, repr=False)

    @property
    def counts(self) -> list[int]:
        """How many regions each image has."""
        return [len(boxes) for boxes in self.proposals]

    @property
    def boxes(self) -> Tensor:
        """(R, 4) xyxy: the proposals of all images together."""
        return torch.cat(self.proposals)

    def image_of_row(self) -> Tensor:
        """(R,) int64: which image each region is of."""
        counts = torch.tensor(self.counts, device=self.labels.device)
        images = torch.arange(len(self.proposals), device=self.labels.device)
        return images.repeat_interleave(counts, output_size=len(self.labels))

    def foreground(self, head: HeadSettings) -> Tensor:
        """(R,) bool: which regions have an object's label, by the conventions of ``head``, the student's."""
        num_classes = class_count(self.head.logits.shape[1], head.activation)
        return is_foreground(self.labels, head.background, num_classes)

    def select(self, keep: Tensor) -> Regions:
        """The regions where ``keep``, (R,) bool, is set, in the same order."""
        kept_counts = torch.stack([part.sum() for part in keep.split(self.counts)]).tolist()
        index = keep.nonzero().flatten()
        return Regions(
            list(self.boxes[index].split(kept_counts)),
            self.labels[index],
            self.gt_boxes[index],
            self.head[index],
            None if self.levels is None else self.levels[index],
            None if self.weights is None else self.weights[index],
            None if self.rows is None else self.rows[index],
            self.grid,
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


def _cat(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


@dataclass
class Batch:
    """What a student is called with, in terms that a teacher of any family reads."""

    images: Sequence[Tensor]  # N x (3, H, W) in [0, 1], sizes may differ
    # N dicts of ground truth: "boxes" (G, 4) xyxy in pixels of the image, "labels" (G,) int64 in the student's
    # convention, and what else its model needs.
    targets: Sequence[dict[str, Tensor]]
    call: Mapping[str, Any] | None = None  # the keywords of the model's own call where it takes something else


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

    losses: dict[str, Tensor]  # scalars () whose sum the detector itself would minimise, under its own names
    inputs: InputBatch
    targets: list[dict[str, Tensor]]  # N dicts of ground truth: at least "boxes" (G, 4) xyxy and "labels" (G,) int64
    features: list[Tensor]  # L x (N, C_l, H_l, W_l), the levels that regions are pooled from
    scales: list[float]  # of each level: feature pixels per student-input pixel
    regions: Regions  # the student's own
    output: Any = None  # what the model itself returned
    tap: FeatureTap | None = None  # at which losses may add the features' gradient; the distiller's


@dataclass
class TeacherPass:
    """Backbone and pyramid of the teacher; its head runs, or is read, later: on the shared regions."""

    features: list[Tensor]  # L x (N, C_l, H_l, W_l), the levels that regions are pooled from
    scales: list[float]  # of each level: teacher feature pixels per *student*-input pixel
    state: Any  # what the detector itself needs to go on from here
    grid: Any = None  # where the head answers for all of a grid: equal to the student's Regions.grid if the grids are


class Detector(ABC):
    """A model in the role of student or teacher, through what all families of detectors have in common.

    A family of one's own derives from this class. What is abstract is what only the family can know; everything else
    holds for models that are called as torchvision's are, ``model(images, targets)`` for losses and ``model(images)``
    for detections. The methods of the teacher are called under ``torch.no_grad()`` with the model in eval mode.
    """

    # Whether a box head runs on pooled proposals: then it takes those of others, and has pooled what features compare.
    two_stage = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    # --- what it is

    @property
    @abstractmethod
    def channels(self) -> tuple[int, ...]:
        """Channels of each pyramid level."""

    @property
    @abstractmethod
    def strides(self) -> tuple[float, ...]:
        """Nominal pixels of the model's own input per feature pixel, of each level."""

    @property
    @abstractmethod
    def input_size(self) -> float:
        """Nominal short side of the model's input in pixels; two models' quotient is their input ratio."""

    @property
    @abstractmethod
    def head(self) -> HeadSettings:
        """How the outputs of the head are to be read."""

    @property
    def roi(self) -> RoIAlignSpec:
        """How a region is pooled from the pyramid, for the term that compares features."""
        return RoIAlignSpec(aligned=True)

    # --- as a student

    def read_call(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> Batch:
        """The arguments of the model's own training call, read. A family with another call has other arguments."""
        return Batch(images, targets)

    def call(self, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
        """The model's own training call: what it returns, and in it the losses () to add up, under its own names."""
        losses = self.model(batch.images, batch.targets)
        return losses, losses

    @abstractmethod
    def student_pass(self, batch: Batch, on_inputs: Callable[[InputBatch], None] = lambda inputs: None) -> StudentPass:
        """The model's own training forward, its losses untouched, and the regions that it names.

        Args:
            batch: what :meth:`read_call` returned.
            on_inputs: called once, as soon as the batch exists that the backbone is going to see.
        """

    def student_regions(self, student_pass: StudentPass, proposals: list[Tensor]) -> Regions:
        """Label and sample ``proposals``, N x (P_n, 4) xyxy, by the student's rules, then run its head on them."""
        raise ValueError(f"{self._kind} names its own regions: only sharing='student' goes with it as a student")

    def as_called(self, batch: Batch, output: Any, losses: dict[str, Tensor]) -> Any:
        """What the student's own training loop expects of a call.

        Args:
            batch: what it was called with.
            output: what the model itself returned.
            losses: scalars (): the detector's own under its names, then the terms of the distillation.
        """
        return losses

    # --- as a teacher

    @abstractmethod
    def teacher_pass(self, images: Sequence[Tensor], inputs: InputBatch, ratio: float) -> TeacherPass:
        """Backbone and pyramid on ``images``, N x (3, H, W) in [0, 1].

        They are resized to ``ratio`` times the size that they have in the student's ``inputs``.
        """

    def teacher_proposals(self, teacher_pass: TeacherPass) -> list[Tensor]:
        """The teacher's own proposals, N x (P_n, 4) xyxy, in student-input pixels."""
        raise ValueError(f"{self._kind} has no proposals: only sharing='student' goes with it as a teacher")

    @abstractmethod
    def answers(self, teacher_pass: TeacherPass, regions: Regions, classes: Tensor) -> HeadOutputs:
        """What the teacher says of the student's regions.

        Args:
            teacher_pass: what :meth:`teacher_pass` returned for the same images.
            regions: the student's. Their labels and head are in terms of the student.
            classes: (R,) int64, the class of each region's object as the teacher counts its own, from 0 without the
                background; -1 where a region has no object.

        Returns:
            Logits and boxes in the terms of :attr:`head`; boxes in student-input pixels.
        """

    # --- in use

    def detect(self, images: Sequence[Tensor]) -> list[Detections]:
        """Detections on ``images``, N x (3, H, W) in [0, 1], with the model in eval mode."""
        return self.model(images)

    def deployable(self) -> nn.Module:
        """A copy in eval mode that needs no op of tardkd: it can be traced with a list of one image.

        That of one of torchvision's detectors can be scripted, too.
        """
        return copy.deepcopy(self.model).eval()

    # --- its parts, for those who time, compile, examine or load them

    @property
    def backbone(self) -> nn.Module:
        """What runs once an image, backbone and pyramid; the whole model where it has no module of that name."""
        backbone = getattr(self.model, "backbone", None)
        return backbone if isinstance(backbone, nn.Module) else self.model

    @property
    def pyramid(self) -> nn.Module | None:
        """The module that puts out the levels which regions are pooled from; None: nobody knows."""
        return self.backbone if self.backbone is not self.model else None

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        """What runs behind the backbone and puts out the numbers that detections are made of; none: nobody knows."""
        return ()

    @property
    def class_tensors(self) -> tuple[str, ...]:
        """How the names of the tensors in the model's state dict begin whose sizes depend on the classes."""
        return ()

    def of_classes(self, state: Mapping[str, Tensor], columns: Sequence[int], count: int) -> dict[str, Tensor]:
        """A state dict of the model for ``count`` classes, cut down to those at ``columns``, background included."""
        raise ValueError(f"{self._kind} cannot be cut down to some of its classes")

    @property
    def longest_aspect(self) -> float:
        """How many times as long as wide an image may be, for the model's resizing to leave a pixel of its width."""
        return math.inf

    def input_scale(self, sizes: Tensor) -> Tensor:
        """Input pixels per image pixel (G, 2) as the model resizes images of these widths and heights (G, 2) in use."""
        return (self.input_size / sizes.amin(dim=1, keepdim=True)).expand(-1, 2)

    @property
    def anchors(self) -> Anchors | None:
        """The boxes that it starts from; None where it has none, or places them by other rules."""
        return None

    @property
    def region_sampler(self) -> Any:
        """What chooses ``batch_size_per_image`` regions of an image that train the head; None: all of them do."""
        return None

    @property
    def _kind(self) -> str:
        return f"a {type(self.model).__name__}"
