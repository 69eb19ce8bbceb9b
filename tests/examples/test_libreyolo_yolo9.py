"""The example of a detector of one's own, on models with random weights."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from detectors.tiny import tiny_detector
from torch import Tensor, nn

from tardkd.detectors.base import HeadOutputs
from tardkd.distill import Distiller, DistillSettings

yolo9 = pytest.importorskip("libreyolo.models.yolo9.nn", exc_type=ImportError)

CLASSES = 3
OPEN = dict(feature_gate="all", classification_gate="foreground", regression_gate="foreground")


@pytest.fixture
def module(example) -> ModuleType:
    return example("libreyolo_yolo9")


def yolo(seed: int = 0, size: int = 64, kind: str = "t") -> nn.Module:
    """A model that finds some objects at once: its class scores start at a half, its boxes a few cells wide."""
    torch.manual_seed(seed)
    model = yolo9.LibreYOLO9Model(kind, nb_classes=CLASSES, img_size=size)
    for box_tower, class_tower in zip(model.head.cv2, model.head.cv3):
        nn.init.zeros_(class_tower[-1].bias)
        box_tower[-1].bias.data = 0.5 * torch.arange(16.0, 0, -1).repeat(4)
    return model


def batch(second: bool = True) -> tuple[Tensor, Tensor]:
    """Two images and their objects; the padding of the second's rows has the class -1."""
    generator = torch.Generator().manual_seed(0)
    rows = [[[0, 0.1, 0.1, 0.6, 0.7], [2, 0.3, 0.4, 0.9, 0.9]], [[1, 0.2, 0.2, 0.8, 0.8], [-1, 0, 0, 0, 0]]]
    targets = torch.tensor(rows)
    if not second:
        targets[1] = torch.tensor([-1.0, 0, 0, 0, 0])
    return torch.rand(2, 3, 64, 96, generator=generator), targets


def means(head: HeadOutputs) -> Tensor:
    """(R, 4) xyxy: of the distributions over the boxes' sides."""
    return (head.sides.logits.softmax(2) * head.sides.places).sum(2) * torch.tensor([-1, -1, 1, 1])


def test_the_losses_are_the_models_and_nothing_is_left_on_it(module):
    model, plain = yolo(), yolo()
    detector, (images, targets) = module.YOLO9Detector(model), batch()
    expected = plain(images, targets=targets)
    result = detector.student_pass(detector.read_call(images, targets))
    for name, value in expected.items():
        assert torch.equal(result.output[name], value), name
    assert result.losses == {"total_loss": result.output["total_loss"]}
    assert all(not part._forward_hooks for part in model.modules())
    assert type(vars(model.head._loss_fn)["matcher"]).__name__ == "BoxMatcher"


def test_the_regions_are_the_assigners(module):
    model = yolo()
    detector, (images, targets) = module.YOLO9Detector(model), batch()
    regions = detector.student_pass(detector.read_call(images, targets)).regions
    plain = yolo()
    raw = plain(images)
    criterion = plain.head._get_loss_fn(images.device)
    criterion.update_anchors([96, 64])
    logits, bins, boxes = criterion.vec2box(raw)
    pixels = targets * torch.tensor([1, 96, 64, 96, 64])
    _, positive, which = criterion.matcher(pixels, (logits.detach(), boxes.detach()), return_indices=True)
    assert positive.sum() > 10
    assert regions.counts == positive.sum(1).tolist()
    image = regions.image_of_row()
    assert torch.equal(image * positive.shape[1] + regions.rows, positive.flatten().nonzero().flatten())
    assert torch.equal(regions.head.logits, logits[positive]) and torch.equal(regions.head.boxes, boxes[positive])
    objects = pixels[image, which[positive]]
    assert torch.equal(regions.labels, objects[:, 0].long()) and torch.equal(regions.gt_boxes, objects[:, 1:])
    assert torch.equal(regions.boxes, regions.gt_boxes)
    assert torch.equal(2.0 ** (3 + regions.levels), criterion.vec2box.scaler[regions.rows])
    assert torch.equal(regions.head.sides.logits, bins[positive])
    torch.testing.assert_close(means(regions.head), regions.head.boxes, rtol=1e-4, atol=1e-3)
    assert (regions.weights > 0).all() and (regions.weights <= 1).all() and regions.weights.std() > 0


def test_a_teacher_answers_with_its_own_outputs(module):
    """In the same rows where the grids are equal, and the boxes of its own decoding."""
    student, teacher = module.YOLO9Detector(yolo()), module.YOLO9Detector(yolo(1).eval())
    images, targets = batch()
    with torch.no_grad():
        result = student.student_pass(student.read_call(images, targets))
        seen = teacher.teacher_pass(list(images), result.inputs, 1.0)
        assert seen.grid == result.regions.grid
        answers = teacher.answers(seen, result.regions, result.regions.labels)
        predictions = teacher.model(images)["predictions"]
        asked = predictions[result.regions.image_of_row(), :, result.regions.rows]
    torch.testing.assert_close(answers.boxes, asked[:, :4])
    torch.testing.assert_close(means(answers), answers.boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(answers.logits.sigmoid(), asked[:, 4:])


def test_a_teacher_of_another_size_answers_in_the_students_pixels(module):
    student, teacher = module.YOLO9Detector(yolo()), module.YOLO9Detector(yolo(1, size=128).eval())
    images, targets = batch()
    with torch.no_grad():
        result = student.student_pass(student.read_call(images, targets))
        seen = teacher.teacher_pass(list(images), result.inputs, 2.0)
        assert seen.grid != result.regions.grid and seen.features[0].shape[-2:] == (16, 24)
        answers = teacher.answers(seen, result.regions, result.regions.labels)
        doubled = nn.functional.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
        boxes = teacher.model(doubled)["predictions"][:, :4] / 2
    torch.testing.assert_close(means(answers), answers.boxes, rtol=1e-4, atol=1e-3)
    for box, image in zip(answers.boxes, result.regions.image_of_row()):
        assert (boxes[image] - box[:, None]).abs().amax(0).min() < 1e-4


@pytest.mark.parametrize("kind", ["t", "s"])
def test_it_trains(module, kind):
    """A few steps on one batch: with equal channels, and with an adapter a level."""
    student, teacher = yolo(), yolo(1, kind=kind)
    untouched = copy.deepcopy(teacher.state_dict())
    settings = DistillSettings(feature=0.05, classification=1.0, regression=0.05, distribution=1.0, **OPEN)
    distiller = Distiller(module.YOLO9Detector(student), module.YOLO9Detector(teacher), settings).train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.002)
    history: list[dict[str, Any]] = []
    for _ in range(6):
        losses = distiller(*batch())
        optimizer.zero_grad()
        losses["total_loss"].backward()
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    terms = ["distill_feature", "distill_classification", "distill_regression", "distill_distribution"]
    assert all(history[0][name] > 0 for name in terms)
    own = sum(history[0][name] for name in ("box_loss", "dfl_loss", "cls_loss"))
    assert history[0]["total_loss"] == pytest.approx(own + sum(history[0][name] for name in terms))
    assert history[-1]["distill_classification"] < 0.9 * history[0]["distill_classification"]
    assert all(torch.equal(value, untouched[name]) for name, value in teacher.state_dict().items())
    assert set(distiller.student.state_dict()) == set(yolo().state_dict())


def test_without_objects(module):
    images, targets = batch(second=False)
    distiller = Distiller(module.YOLO9Detector(yolo()), module.YOLO9Detector(yolo(1)), DistillSettings(feature=0.1))
    assert torch.isfinite(distiller(images, targets)["total_loss"])
    losses = distiller(images, torch.full_like(targets, -1).mul(torch.tensor([1.0, 0, 0, 0, 0])))
    assert all(losses[f"distill_{name}"] == 0 for name in ("feature", "classification", "regression"))
    losses["total_loss"].backward()


def test_teachers_of_another_family_teach_it_and_it_them(module):
    """Names say how the classes match where the labels count from 1 on one side and from 0 on the other."""
    names = {"student_classes": ["a", "b", "c"], "teacher_classes": ["a", "b", "c"]}
    settings = DistillSettings(feature=0.1, **OPEN)
    student, other = module.YOLO9Detector(yolo()), tiny_detector(num_classes=CLASSES + 1)
    losses = Distiller(student, other, settings, **names)(*batch())
    assert losses["distill_classification"] > 0 and torch.isfinite(losses["total_loss"])
    images, targets = batch()
    boxes = [{"labels": of[:, 0].long() + 1, "boxes": of[:, 1:] * torch.tensor([96.0, 64, 96, 64])} for of in targets]
    boxes[1] = {name: values[:1] for name, values in boxes[1].items()}
    student = tiny_detector(num_classes=CLASSES + 1)
    losses = Distiller(student, module.YOLO9Detector(yolo()), settings, **names)(list(images), boxes)
    assert losses["distill_classification"] > 0 and losses["distill_regression"] > 0


def test_it_is_short(module):
    with open(module.__file__, encoding="utf-8") as file:
        assert len(file.readlines()) <= 60
