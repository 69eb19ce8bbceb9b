"""``Distiller.check``: a batch that is looked at before a training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detectors.tiny import tiny_batch, tiny_detector
from torch import nn

from tardkd.distill import Distiller, DistillSettings, Teacher
from tardkd.distill.examination import SHARE
from tardkd.distill.findings import Findings

OPEN = {"feature_gate": "foreground", "classification_gate": "foreground", "regression_gate": "foreground"}


def pair(student: nn.Module | None = None, teacher: Any = None, **settings: Any) -> Distiller:
    teacher = teacher or tiny_detector(seed=1)
    names = ["cat", "dog", "cow"] if isinstance(teacher, Teacher) else None
    chosen = DistillSettings(**{**OPEN, **settings})
    return Distiller(student or tiny_detector(), teacher, chosen, student_classes=names)


def texts(findings: Findings, level: str) -> str:
    return "\n".join(f"{finding.text} -> {finding.advice}" for finding in findings if finding.level == level)


def test_a_sound_pair() -> None:
    torch.manual_seed(0)
    findings = pair(feature=0.01, classification=0.1, regression=0.01).check(*tiny_batch())
    assert findings.problems == []
    text = str(findings)
    for words in (
        "heads of 4 logits, taken to be the same classes in the same order",
        "8 channels on both sides, compared as the two box heads have pooled them",
        "all losses are finite: loss_classifier ",
        "100% for feature, 100% for classification, 100% for regression",
        "gradient norm at the student's features or in its heads, against the detector's own: feature ",
        "gradients reach all ",
        "the teacher gets none",
    ):
        assert words in text, text


def test_classes_channels_sizes_and_paths_are_told() -> None:
    teacher = Teacher(tiny_detector(seed=1, channels=12, size=96), ["cat", "hound", "pig"], {"hound": "dog"})
    findings = pair(teacher=teacher, path="pyramid").check(*tiny_batch())
    ok = texts(findings, "ok")
    assert "the teacher teaches cat, dog (its 'hound')" in ok
    assert "the student's 8 channels are brought to the teacher's 12 by a 1x1 convolution" in ok
    assert "pooled again from both pyramids; the teacher sees images 1.5 times as large" in ok
    assert "no teacher for cow" in texts(findings, "warning")


def test_the_weights_that_it_suggests_bring_the_terms_to_their_share() -> None:
    def shares(**weights: float) -> dict[str, Any]:
        torch.manual_seed(0)
        findings = pair(**weights).check(*tiny_batch())
        return next(finding.numbers for finding in findings if "shares" in finding.numbers)

    suggested = shares(feature=1.0, classification=1.0, regression=1.0)["suggested"]
    assert suggested.keys() == {"feature", "classification", "regression"}
    assert shares(**suggested)["shares"] == pytest.approx(dict.fromkeys(suggested, SHARE), rel=0.06)


def test_plain_factors_are_to_begin_with_less_than_the_balance_gives() -> None:
    findings = pair(balance="none", feature=1e6, classification=1e6, regression=1e6).check(*tiny_batch())
    text = texts(findings, "warning")
    assert "out of 0.03 to 1" in text and "to start each at 0.3" in text
    balanced = pair(feature=100.0, classification=100.0, regression=100.0).check(*tiny_batch())
    text = texts(balanced, "warning")
    assert "out of 0.1 to 3" in text and "to start each" not in text


def test_gates_that_let_nothing_through_are_named() -> None:
    student = tiny_detector()
    findings = pair(student, copy.deepcopy(student), classification_gate="teacher_better").check(*tiny_batch())
    assert "nothing is transferred by classification" in texts(findings, "warning")


def test_a_tensor_that_no_gradient_reaches_is_a_problem() -> None:
    student = tiny_detector()
    student.spare = nn.Parameter(torch.zeros(3))
    assert "no gradient reaches 1 of " in texts(pair(student).check(*tiny_batch()), "problem")


def test_a_bad_batch_is_a_problem() -> None:
    images, targets = tiny_batch()
    targets[0]["labels"] -= 1
    assert "image 0: box 0 has the label 0" in texts(pair().check(images, targets), "problem")
    assert "image 0 is uint8" in texts(pair().check([image.byte() for image in images], tiny_batch()[1]), "problem")
    assert "divide them by 255" in texts(pair().check([image * 255 for image in images], tiny_batch()[1]), "warning")


def test_a_loss_that_is_not_finite_is_a_problem() -> None:
    teacher = tiny_detector(seed=1)
    with torch.no_grad():
        teacher.roi_heads.box_predictor.cls_score.bias[1] = torch.nan
    assert "NaN or infinity in the teacher's logits" in texts(pair(teacher=teacher).check(*tiny_batch()), "problem")


def test_without_a_teacher_there_is_nothing_to_see() -> None:
    findings = Distiller(tiny_detector(), None, enabled=False).check(*tiny_batch())
    assert [finding.level for finding in findings] == ["skipped"]


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(training: bool) -> None:
    """Neither weights, statistics, gradients nor random numbers, nor where the schedule is."""
    student = tiny_detector()
    student.backbone.body[1] = nn.Sequential(student.backbone.body[1], nn.BatchNorm2d(8))
    distiller = pair(student).train(training)
    distiller.start(2, 4)
    distiller.set_progress(1, 2)
    distiller.stats = {"lambda": torch.tensor(0.5)}
    before = copy.deepcopy(distiller.state_dict())
    torch.manual_seed(7)
    random = torch.get_rng_state()
    with torch.no_grad():
        distiller.check(*tiny_batch())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in distiller.state_dict().items())
    assert all(parameter.grad is None for parameter in distiller.parameters())
    assert distiller.training == training and distiller.weight == 0.5 and distiller.stats == {"lambda": 0.5}
