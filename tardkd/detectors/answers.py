"""What a head that answers for all of a grid, or with a set of detections, says of the student's regions."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

from tardkd.ops.spec import first_class_label

from .base import HeadOutputs, HeadSettings, Regions


def rows_of(outputs: HeadOutputs, regions: Regions) -> HeadOutputs:
    """The answers in the regions' own rows, for a head whose grid is the student's.

    Args:
        outputs: of N x A rows in one: those of the first image, then those of the second, and so on.
        regions: the student's, with ``rows``.
    """
    assert regions.rows is not None
    per_image = len(outputs.logits) // len(regions.proposals)
    return outputs[regions.image_of_row() * per_image + regions.rows]


def best_for(outputs: HeadOutputs, regions: Regions, classes: Tensor, head: HeadSettings) -> HeadOutputs:
    """The best answer for each region's object: the one with the largest probability of its class times IoU squared.

    The square makes the place count more than the score, by our own choice: of two answers that are about as sure the
    nearer one is wanted. A region without an object gets the answer that overlaps its box most.

    Args:
        outputs: as in :func:`rows_of`, with boxes (N x A, 4) xyxy in student-input pixels.
        regions: the student's.
        classes: (R,) int64, the object's class as the head counts them, from 0; -1: none.
        head: how the outputs are to be read.
    """
    has_object = classes >= 0
    wanted = torch.where(has_object[:, None], regions.gt_boxes.float(), regions.boxes.float())
    questions = torch.cat([wanted, classes[:, None].float()], dim=1).split(regions.counts)
    count = len(outputs.logits) // max(1, len(questions))
    chosen = [
        _best_rows(logits, boxes, asked, head) + image * count
        for image, (logits, boxes, asked) in enumerate(
            zip(outputs.logits.split(count), outputs.boxes.split(count), questions)
        )
    ]
    return outputs[torch.cat(chosen)]


def _best_rows(logits: Tensor, offered: Tensor, questions: Tensor, head: HeadSettings) -> Tensor:
    """(R_n,) int64: the best of one image's A rows for each of the ``questions``.

    Args:
        logits: (A, K') of the image.
        offered: (A, 4) xyxy, the boxes of the same rows.
        questions: (R_n, 5) xyxy and class or -1.
        head: how the outputs are to be read.
    """
    asked, question_of_row = questions.unique(dim=0, return_inverse=True)  # many regions are of one object
    boxes, classes = asked[:, :4], asked[:, 4].long()
    logits = logits.float()
    scores = logits.softmax(1) if head.activation == "softmax" else logits.sigmoid()
    first = first_class_label(head.background) if head.activation == "softmax" else 0
    probability = scores[:, first + classes.clamp(min=0)].T  # (Q, A)
    overlap = box_iou(boxes, offered.float()).nan_to_num()  # (Q, A); boxes without an area overlap nothing
    merit = torch.where(classes[:, None] >= 0, probability * overlap**2, overlap)
    return merit.argmax(1)[question_of_row]
