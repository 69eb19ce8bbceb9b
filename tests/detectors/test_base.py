"""Selecting and joining regions keeps every row's parts together and the rows grouped by image."""

from __future__ import annotations

import pytest
import torch

from tardkd import detectors
from tardkd.detectors.base import HeadOutputs, HeadSettings, Regions, RoISettings
from tardkd.ops.spec import RoIAlignSpec


def regions(counts: list[int], start: int) -> Regions:
    """Row number r carries r in every part, so that a row that lost a part shows."""
    rows = torch.arange(start, start + sum(counts)).float()
    boxes = rows[:, None].repeat(1, 4)
    head = HeadOutputs(rows[:, None].repeat(1, 3), rows[:, None].repeat(1, 12), rows.view(-1, 1, 1, 1))
    return Regions(list(boxes.split(counts)), rows.long(), boxes + 100, head)


def assert_rows(result: Regions, per_image: list[list[int]]) -> None:
    assert [boxes[:, 0].tolist() for boxes in result.proposals] == per_image
    rows = [row for image in per_image for row in image]
    assert result.labels.tolist() == rows
    assert (result.gt_boxes[:, 3] - 100).tolist() == rows
    assert result.head.logits[:, 2].tolist() == rows
    assert result.head.boxes[:, 11].tolist() == rows
    assert result.head.pooled.flatten().tolist() == rows


def test_select() -> None:
    keep = torch.tensor([False, True, True, False, True, False])
    assert_rows(regions([3, 0, 1, 2], 0).select(keep), [[1, 2], [], [], [4]])


def test_select_nothing() -> None:
    assert_rows(regions([2, 1], 0).select(torch.zeros(3, dtype=torch.bool)), [[], []])


def test_union() -> None:
    assert_rows(regions([2, 0, 1], 0).union(regions([1, 2, 0], 10)), [[0, 1, 10], [11, 12], [2]])


@pytest.mark.parametrize(
    "background, activation, expected",
    [
        ("first", "softmax", [False, True, True, True]),
        ("last", "softmax", [True, True, False, True]),
        ("first", "sigmoid", [False, True, True, True]),
        ("last", "sigmoid", [True, True, True, False]),
    ],
)
def test_foreground(background: str, activation: str, expected: list[bool]) -> None:
    """Three logits are two classes and the background, or three classes."""
    head = HeadSettings(background, activation, (1.0,) * 4, None)
    assert regions([3, 1], 0).foreground(head).tolist() == expected


def test_old_names_still_name_the_same() -> None:
    assert detectors.DetectorAdapter is detectors.Detector
    assert RoISettings is RoIAlignSpec
