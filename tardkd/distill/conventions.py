"""Two heads in one convention: what a teacher of another family says, in the student's terms.

Class logits are brought to the student's activation. The two conversions are each other's inverse where there is one
class:

- softmax with a background to sigmoid: the log-odds of each class, log p_k - log(1 - p_k), exactly.
- sigmoid to softmax with a background: the logits z_k beside a background of 0. K sigmoid outputs are independent
  events; under the condition that at most one of them holds, "only k" and "none" relate as exp(z_k) and 1, which is
  this softmax.

Boxes are compared as deltas where both heads write deltas to the same boxes, else as boxes.

Distributions over the sides of a box are compared bin by bin. Where the teacher has its bins in other places, or
another number of them, each of them is shared between the two of the student's bins around it, as the distribution
focal loss shares an object's side. That keeps the mean, except beyond the student's first and last bin.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tardkd.detectors.base import HeadOutputs, HeadSettings, Regions, Sides
from tardkd.ops.spec import BoxCoding, background_label, first_class_label

LEAST = 1e-30  # of a probability whose logarithm is taken in float64
MAX_GROWTH = 4.135166556742356  # log(1000 / 16): where torchvision and the ops clamp dw and dh


def common_coding(student: HeadSettings, teacher: HeadSettings) -> BoxCoding:
    """How the boxes of the two are compared."""
    return "deltas" if student.box_coding == teacher.box_coding == "deltas" else "boxes"


def common_widths(
    widths: tuple[int, int], own: HeadSettings, student: HeadSettings, coding: BoxCoding
) -> tuple[int, int]:
    """The columns of (logits, boxes) that outputs in the convention ``own`` have in the student's convention."""
    extra = (student.activation == "softmax") - (own.activation == "softmax")
    return widths[0] + extra, widths[1] if coding == "deltas" else 4


def in_students_terms(
    outputs: HeadOutputs, own: HeadSettings, student: HeadSettings, regions: Regions, coding: BoxCoding
) -> HeadOutputs:
    """A head's outputs with logits for the student's activation, and boxes in the common coding.

    Args:
        outputs: of the regions; classes and background stand where the student has them.
        own: how the outputs are to be read, but for the place of the background.
        student: how the student's are.
        regions: the student's, with labels in its convention.
        coding: of :func:`common_coding`.
    """
    logits, boxes = outputs.logits, outputs.boxes
    if own.activation != student.activation:
        to = to_sigmoid if student.activation == "sigmoid" else to_softmax
        logits = to(logits, background_label(student.background, _classes(logits, own)))
    if coding == "boxes" and own.box_coding == "deltas":
        has_background = boxes.shape[1] == 4 * (_classes(outputs.logits, own) + 1)
        first = 0 if has_background else first_class_label(student.background)
        boxes = decode(_of_class(boxes, regions.labels - first), regions.boxes, own.box_weights)
    return replace(outputs, logits=logits, boxes=boxes)


def _classes(logits: Tensor, head: HeadSettings) -> int:
    return logits.shape[1] - (head.activation == "softmax")


# --- logits -------------------------------------------------------------------------------------------------


def to_sigmoid(logits: Tensor, background: int) -> Tensor:
    """(R, K + 1) softmax logits with the background in that column as (R, K) sigmoid logits: the log-odds."""
    log_p = logits.double().log_softmax(1)
    odds = log_p - (-torch.expm1(log_p)).clamp(min=LEAST).log()
    return torch.cat([odds[:, :background], odds[:, background + 1 :]], dim=1).to(logits.dtype)


def to_softmax(logits: Tensor, background: int) -> Tensor:
    """(R, K) sigmoid logits as (R, K + 1) softmax logits with the background, 0, in that column."""
    nothing = logits.new_zeros(len(logits), 1)
    return torch.cat([logits[:, :background], nothing, logits[:, background:]], dim=1)


# --- boxes --------------------------------------------------------------------------------------------------


def _of_class(deltas: Tensor, columns: Tensor) -> Tensor:
    """(R, 4): of deltas (R, 4k) those of each region's column (R,); any for a region without an object."""
    by_class = deltas.unflatten(1, (-1, 4))
    chosen = columns.clamp(0, by_class.shape[1] - 1)[:, None, None].expand(-1, 1, 4)
    return by_class.gather(1, chosen)[:, 0]


def decode(deltas: Tensor, boxes: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Deltas (R, 4) to boxes (R, 4) xyxy as boxes of their own, in float32 at least; Faster R-CNN's coding."""
    deltas = deltas.to(torch.promote_types(deltas.dtype, torch.float32))
    boxes = boxes.to(deltas)
    deltas = deltas / deltas.new_tensor(weights)
    size = boxes[:, 2:] - boxes[:, :2]
    centre = boxes[:, :2] + size * (0.5 + deltas[:, :2])
    half = 0.5 * size * deltas[:, 2:].clamp(max=MAX_GROWTH).exp()
    return torch.cat([centre - half, centre + half], dim=1)


# --- distributions ------------------------------------------------------------------------------------------


@torch.no_grad()
def in_students_bins(teacher: Sides, student: Sides, temperature: float) -> Tensor:
    """(R, 4, bins) logits over the student's bins of what a teacher says, in float32 at least.

    Args:
        teacher: of R regions.
        student: of the same, with bins of its own.
        temperature: what logits are divided by before the softmax, here and by the loss.
    """
    exact = torch.promote_types(student.logits.dtype, torch.float32)
    likely = (teacher.logits.to(exact) / temperature).softmax(2)
    own, theirs = student.places.to(exact), teacher.places.to(exact)
    lower, upper = own[:, :, :-1, None], own[:, :, 1:, None]
    # (R, 4, bins - 1, their bins): how far each of theirs is on its way from one of the student's to the next
    passed = ((theirs[:, :, None] - lower) / (upper - lower).clamp(min=LEAST)).clamp(0, 1)
    begun = F.pad(passed, (0, 0, 1, 0), value=1.0)
    ended = F.pad(passed, (0, 0, 0, 1), value=0.0)
    shared = ((begun - ended) * likely[:, :, None]).sum(3)
    return temperature * shared.clamp(min=LEAST).log()


# --- scores -------------------------------------------------------------------------------------------------


@torch.no_grad()
def scores(outputs: HeadOutputs, labels: Tensor, head: HeadSettings) -> Tensor:
    """(R,) sqrt(p(y) q) with the head's quality q of its box, as FCOS ranks its detections.

    Args:
        outputs: with a quality.
        labels: (R,) int64, the student's.
        head: the student's, in whose terms outputs and labels are.
    """
    assert outputs.quality is not None
    logits = outputs.logits.float()
    values = logits.softmax(1) if head.activation == "softmax" else logits.sigmoid()
    columns = labels if head.activation == "softmax" else labels - first_class_label(head.background)
    probability = values.gather(1, columns.clamp(0, values.shape[1] - 1)[:, None])[:, 0]
    return (probability * outputs.quality.float()).sqrt()
