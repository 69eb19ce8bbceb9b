"""Answers of heads that say something everywhere, picked for the student's regions: against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from tardkd.detectors.answers import best_for, rows_of
from tardkd.detectors.base import HeadOutputs, HeadSettings, Regions

ROWS, CLASSES = 40, 3
PER_IMAGE = [3, 0, 4]


def random_boxes(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner, size = 60 * torch.rand(2, rows, 2, generator=generator)
    return torch.cat([corner, corner + size + 4], dim=1)


def answers(columns: int) -> HeadOutputs:
    count = ROWS * len(PER_IMAGE)
    logits = 3 * torch.randn(count, columns, generator=torch.Generator().manual_seed(0))
    return HeadOutputs(logits, random_boxes(count, 1), quality=torch.rand(count))


def asked() -> tuple[Regions, Tensor]:
    count = sum(PER_IMAGE)
    gt_boxes = random_boxes(count, 3)
    gt_boxes[1] = gt_boxes[0]  # two regions of one object
    classes = torch.tensor([2, 2, 0, 1, -1, 0, -1])
    proposals = list(random_boxes(count, 4).split(PER_IMAGE))
    head = HeadOutputs(torch.zeros(count, 4), torch.zeros(count, 4))
    rows = torch.arange(count) * 5
    return Regions(proposals, classes + 1, gt_boxes, head, rows=rows, grid="a grid"), classes


def test_rows_are_counted_in_each_image() -> None:
    outputs, (regions, _) = answers(4), asked()
    images = [0, 0, 0, 2, 2, 2, 2]
    expected = [ROWS * image + 5 * row for row, image in enumerate(images)]
    found = rows_of(outputs, regions)
    assert torch.equal(found.logits, outputs.logits[expected]) and torch.equal(found.boxes, outputs.boxes[expected])
    assert found.quality is not None and outputs.quality is not None
    assert torch.equal(found.quality, outputs.quality[expected])


@pytest.mark.parametrize(
    "head",
    [
        HeadSettings("first", "softmax", (1.0,) * 4, None, "boxes"),
        HeadSettings("last", "softmax", (1.0,) * 4, None, "boxes"),
        HeadSettings("first", "sigmoid", (1.0,) * 4, None, "boxes"),
    ],
    ids=lambda head: f"{head.activation} {head.background}",
)
def test_the_best_answer_for_each_object(head: HeadSettings) -> None:
    softmax = head.activation == "softmax"
    outputs, (regions, classes) = answers(CLASSES + softmax), asked()
    found = best_for(outputs, regions, classes, head)
    images, boxes = [0, 0, 0, 2, 2, 2, 2], regions.boxes
    for row, (image, place) in enumerate(zip(images, classes.tolist())):
        best, chosen = -1.0, None
        for candidate in range(ROWS * image, ROWS * (image + 1)):
            logits, box = outputs.logits[candidate], outputs.boxes[candidate][None]
            if place < 0:
                merit = box_iou(box, boxes[row][None]).item()
            else:
                column = place + (softmax and head.background == "first")
                p = (logits.softmax(0) if softmax else logits.sigmoid())[column].item()
                merit = p * box_iou(box, regions.gt_boxes[row][None]).item() ** 2
            if merit > best:
                best, chosen = merit, candidate
        assert torch.equal(found.logits[row], outputs.logits[chosen]), row
        assert torch.equal(found.boxes[row], outputs.boxes[chosen]), row


def test_no_regions_get_no_answers() -> None:
    outputs = answers(4)
    head = HeadSettings("first", "softmax", (1.0,) * 4, None, "boxes")
    none = HeadOutputs(torch.zeros(0, 4), torch.zeros(0, 4))
    regions = Regions([torch.zeros(0, 4)] * 3, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), none)
    assert best_for(outputs, regions, regions.labels, head).logits.shape == (0, 4)


def test_boxes_without_an_area_are_no_error() -> None:
    outputs, (regions, classes) = answers(4), asked()
    outputs.boxes[:, 2:] = outputs.boxes[:, :2]
    head = HeadSettings("first", "softmax", (1.0,) * 4, None, "boxes")
    assert best_for(outputs, regions, classes, head).logits.shape == (7, 4)
