"""Anchors against objects."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_convert
from train.recipe import MODEL, recipe

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
