"""Anchors against objects."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_convert
from train.recipe import MODEL, recipe

from tardkd.detectors.anchors import Anchors
from tardkd.doctor import anchors
from tardkd.train.build import build_dataset
from tardkd.train.models import ModelSpec, build_model

from .reports import doctor, found, numbers


def test_anchors_that_fit_nothing_come_with_better_ones(tmp_path):
    report = doctor(tmp_path, "student.anchor_sizes=[100,200,400]", role="baseline")
    (text,) = found(report, "warning", "anchors")
    assert "student.anchor_sizes=[" in text
    better = text.split("student.anchor_sizes=")[1].split("]")[0] + "]"
    again = doctor(tmp_path, f"student.anchor_sizes={better}", role="baseline")
    assert numbers(again, "anchors", "unmatched") < numbers(report, "anchors", "unmatched")


def test_boxes_are_measured_in_the_students_pixels(tmp_path):
    config = recipe(tmp_path)
    dataset = build_dataset(config, "train")
    sides = []
    for size in (64, 128):
        model = build_model(ModelSpec(**{**MODEL, "min_size": size, "max_size": size}), 6)
        boxes, limits = anchors._boxes(dataset, model)
        _images, targets = model.transform([dataset[0][0].float() / 255], [dict(dataset[0][1])])
        expected = box_convert(targets[0]["boxes"], "xyxy", "cxcywh")
        torch.testing.assert_close(boxes[: len(expected)], expected)
        assert limits[0].tolist() == [size, size]
        sides.append(boxes[:, 2:].mean())
    assert sides[1] == pytest.approx(2 * float(sides[0]))


MOBILE = Anchors(((32.0, 64.0, 128.0),) * 3, ((0.5, 1.0, 2.0),) * 3, (32.0, 32.0, 64.0))


def objects(width: float, height: float) -> torch.Tensor:
    """Boxes of one size, spread over an image of 320 pixels."""
    places = torch.arange(40, 280, 7, dtype=torch.float32)
    return torch.cat(
        [torch.cartesian_prod(places, places), torch.tensor([[width, height]]).repeat(len(places) ** 2, 1)], 1
    )


@pytest.mark.parametrize(
    "anchors_of_it, width, height, reason",
    [
        (MOBILE, 34, 34, "the anchors stand 32, 32, 64 pixels apart"),
        (MOBILE, 150, 12, "their shapes may be the reason: anchors are 0.5, 1, 2 times as high as wide"),
        (MOBILE, 9, 9, "smaller than the smallest anchor"),
        (MOBILE.resized([8, 9, 10]), 60, 60, "larger than the largest anchor"),
    ],
)
def test_the_reason_is_the_one_that_would_help(anchors_of_it, width, height, reason):
    boxes = objects(width, height)
    limits = torch.full((len(boxes), 2), 320.0)
    unmatched = anchors._unmatched(boxes, limits, anchors_of_it)
    assert unmatched > anchors.MANY
    assert reason in anchors._advice(anchors_of_it, boxes, limits, unmatched, is_light=False)


def test_coarse_strides_are_named_in_a_report(tmp_path):
    mobile = "student={name: fasterrcnn_mobilenet_v3_large_320_fpn, min_size: 128, max_size: 128}"
    (text,) = found(doctor(tmp_path, mobile, role="baseline"), "warning", "anchors")
    assert "the anchors stand 32, 32, 64 pixels apart" in text
