"""The distiller on a GPU: the teacher beside the student, and no waiting for what is only to be looked at."""

from __future__ import annotations

import pytest
import torch
from detectors.tiny import tiny_batch, tiny_detector

from tardkd.distill import Distiller, DistillSettings

pytestmark = pytest.mark.gpu

HALF_A_SECOND = 10**9  # cycles, about


def pair() -> Distiller:
    return Distiller(tiny_detector(), tiny_detector(seed=1), DistillSettings(feature_gate="foreground")).cuda()


def losses(distiller: Distiller) -> dict[str, torch.Tensor]:
    images, targets = tiny_batch()
    torch.manual_seed(3)
    return distiller(
        [image.cuda() for image in images], [{key: value.cuda() for key, value in target.items()} for target in targets]
    )


def test_a_slow_teacher_is_waited_for():
    expected = losses(pair())
    distiller = pair()
    distiller.teacher.backbone.register_forward_pre_hook(lambda *_: torch.cuda._sleep(HALF_A_SECOND))
    for name, value in losses(distiller).items():
        torch.testing.assert_close(value, expected[name])


def test_a_slow_student_does_not_lose_its_batch_to_the_teacher():
    expected = losses(pair())
    distiller = pair()
    distiller.student.backbone.register_forward_pre_hook(lambda *_: torch.cuda._sleep(HALF_A_SECOND))
    for _ in range(3):  # memory is used again
        for name, value in losses(distiller).items():
            torch.testing.assert_close(value, expected[name])


def test_the_teacher_runs_on_a_stream_of_its_own():
    distiller = pair()
    streams = []
    for model in (distiller.student, distiller.teacher):
        model.backbone.register_forward_pre_hook(lambda *_: streams.append(torch.cuda.current_stream()))
    losses(distiller)
    teachers, students = streams
    assert students == torch.cuda.current_stream() and teachers != students


def test_a_term_that_is_not_finite_is_raised_by_the_next_step():
    distiller = pair()
    with torch.no_grad():
        distiller.teacher.roi_heads.box_predictor.cls_score.bias[1] = torch.nan
    losses(distiller)
    with pytest.raises(FloatingPointError, match="the teacher's logits"):
        losses(distiller)
    losses(distiller)
    with pytest.raises(FloatingPointError, match="the teacher's logits"):
        distiller.task_state()
