"""D-FINE's distributions: their means are its boxes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tardkd.detectors import for_model
from tardkd.detectors.base import HeadOutputs
from tardkd.detectors.transformers import DFineDetector

from .tiny import tiny_call, tiny_query_detector


def corners(head: HeadOutputs) -> torch.Tensor:
    """(R, 4) xyxy, the means of the distributions."""
    assert head.sides is not None and head.sides.logits.shape == head.sides.places.shape
    assert (head.sides.places.diff(dim=2) > 0).all()
    means = (head.sides.logits.softmax(2) * head.sides.places).sum(2)
    return means * torch.tensor([-1, -1, 1, 1])


def model(seed: int = 0) -> torch.nn.Module:
    one = tiny_query_detector("d_fine", seed=seed)
    for name, weight in one.named_parameters():
        if "bbox_embed" in name and weight.dim() > 1:  # fresh ones leave all sides where they were first drawn
            torch.nn.init.normal_(weight, std=0.5)
    return one


def test_those_of_a_student_are_of_the_queries_that_were_matched():
    detector = for_model(model().train())
    assert isinstance(detector, DFineDetector) and detector.head.bins == 33
    regions = detector.student_pass(detector.read_call(**tiny_call())).regions
    assert len(regions.labels) == 3 and regions.head.sides.logits.requires_grad
    torch.testing.assert_close(corners(regions.head), regions.head.boxes, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("ratio", [1.0, 1.5])
def test_those_of_a_teacher_are_in_the_students_pixels(ratio):
    student, teacher = for_model(model().train()), for_model(model(1).eval())
    call = student.read_call(**tiny_call())
    regions = student.student_pass(call).regions
    with torch.no_grad():
        passed = teacher.teacher_pass(call.images, call.inputs, ratio)
        head = teacher.answers(passed, regions, regions.labels)
    torch.testing.assert_close(corners(head), head.boxes, rtol=1e-4, atol=1e-3)


def test_others_have_none():
    detector = for_model(tiny_query_detector("rt_detr_v2").train())
    assert detector.head.bins is None
    assert detector.student_pass(detector.read_call(**tiny_call())).regions.head.sides is None
