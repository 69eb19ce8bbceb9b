"""Detectron2's models, where it is importable; elsewhere stand-ins with the same interface."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tardkd.detectors import find, for_model
from tardkd.distill import Distiller, DistillSettings

from . import detectron2_standin as standin
from .tiny import tiny_batch, tiny_dense

OPEN = dict(feature_gate="foreground", classification_gate="foreground", regression_gate="foreground")


@pytest.fixture(params=["stand-in", "detectron2"])
def source(request, monkeypatch) -> Any:
    """What builds models: ``build(kind, seed)`` and ``batch()``."""
    if request.param == "stand-in":
        standin.install(monkeypatch)
        yield standin
        return
    structures = pytest.importorskip("detectron2.structures", exc_type=ImportError)
    pytest.importorskip("fvcore", exc_type=ImportError)
    from detectron2.utils.events import EventStorage

    with EventStorage():
        yield Real(structures)


class Real:
    """Detectron2's own, small enough for a CPU."""

    def __init__(self, structures: Any) -> None:
        self.structures = structures

    def build(self, kind: str, seed: int = 0) -> nn.Module:
        from detectron2.config import get_cfg
        from detectron2.modeling import build_model

        cfg = get_cfg()
        cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
        cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.FPN.OUT_CHANNELS = 18, 64, 16
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64], [128]]
        if kind == "rcnn":
            cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
            cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME = "GeneralizedRCNN", "StandardROIHeads"
            cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
            cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
            cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 3, 16
            cfg.MODEL.ROI_BOX_HEAD.NAME, cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = (
                "FastRCNNConvFCHead",
                1,
                16,
            )
            cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
        else:
            cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.NAME = "RetinaNet", "build_retinanet_resnet_fpn_backbone"
            cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
            cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.RETINANET.NUM_CONVS = 3, 1
        torch.manual_seed(seed)
        return build_model(cfg)

    def batch(self, empty: bool = False) -> list[dict[str, Any]]:
        boxes, classes = standin.objects(empty)
        given = []
        for image, of_image, labels in zip(standin.images(), boxes, classes):
            instances = self.structures.Instances(tuple(image.shape[-2:]))
            instances.gt_boxes, instances.gt_classes = self.structures.Boxes(of_image), labels
            given.append({"image": image, "instances": instances})
        return given


@pytest.mark.parametrize("kind", ["rcnn", "retinanet"])
@pytest.mark.parametrize("empty", [False, True])
def test_the_losses_are_the_models_and_nothing_is_left_on_it(source, kind, empty):
    model, plain = source.build(kind).train(), source.build(kind).train()
    detector, given = find(model), source.batch(empty)
    torch.manual_seed(3)
    expected = plain(given)
    torch.manual_seed(3)
    result = detector.student_pass(detector.read_call(given))
    assert {name: value.item() for name, value in result.losses.items()} == {
        name: value.item() for name, value in expected.items()
    }
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in model.modules())
    assert "label_anchors" not in vars(model)
    assert "label_and_sample_proposals" not in vars(getattr(model, "roi_heads", nn.Identity()))
    boxes, classes = standin.objects(empty)
    assert [target["labels"].tolist() for target in result.targets] == [each.tolist() for each in classes]
    regions = result.regions
    rows = regions.foreground(detector.head)
    assert rows.any() and (kind == "rcnn" or rows.all())
    for row in rows.nonzero().flatten():  # each foreground region is of an object of its image
        image = regions.image_of_row()[row]
        same = (boxes[image] == regions.gt_boxes[row]).all(1)
        assert regions.labels[row] in classes[image][same]


@pytest.mark.parametrize("kind", ["rcnn", "retinanet"])
def test_a_copy_as_teacher_says_what_the_student_says(source, kind):
    """Heads, pyramids and images are the same, so is every answer: of colours in order, of rows, of boxes decoded."""
    model = source.build(kind).train()
    teacher = find(source.build(kind).eval())
    detector, given = find(model), source.batch()
    with torch.no_grad():
        batch = detector.read_call(given)
        result = detector.student_pass(batch)
        for inputs in (result.inputs, source_of_another(result.inputs)):
            seen = teacher.teacher_pass(batch.images, inputs, 1.0)
            for own, other in zip(result.features, seen.features):
                torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)
            answers = teacher.answers(seen, result.regions, result.regions.labels)
            torch.testing.assert_close(answers.logits, result.regions.head.logits, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(answers.boxes, result.regions.head.boxes, rtol=1e-3, atol=1e-2)


def source_of_another(inputs: Any) -> Any:
    """The same sizes, from a model that normalises otherwise: the teacher makes a batch of its own."""
    return type(inputs)(inputs.tensor, inputs.sizes, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize("student", ["rcnn", "retinanet"])
@pytest.mark.parametrize("teacher", ["rcnn", "retinanet"])
def test_each_teaches_each(source, student, teacher):
    model = source.build(student)
    distiller = Distiller(model, source.build(teacher, seed=1), DistillSettings(**OPEN)).train()
    losses = distiller(source.batch())
    terms: list[Tensor] = [losses[f"distill_{name}"] for name in ("feature", "classification", "regression")]
    assert all(torch.isfinite(term) and term > 0 for term in terms)
    sum(losses.values()).backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())


def test_an_rcnn_answers_for_the_objects_of_points_by_its_own_proposals(source):
    """FCOS names objects; what a box head makes of the nearest proposal is on the way from there."""
    student, images = for_model(tiny_dense("fcos").train()), tiny_batch()
    teacher = source.build("rcnn", seed=1)
    names = ["a", "b", "c"]
    settings = DistillSettings(**OPEN, teacher_input_ratio=2.0)
    distiller = Distiller(student, teacher, settings, student_classes=names, teacher_classes=names).train()
    losses = distiller(*images)
    assert all(losses[f"distill_{name}"] > 0 for name in ("feature", "classification", "regression"))
    detector = find(teacher)
    with torch.no_grad():
        inputs = student.student_pass(student.read_call(*images)).inputs
        proposals = detector.teacher_proposals(detector.teacher_pass(images[0], inputs, 2.0))
    assert len(proposals) == 2 and all(len(of_image) for of_image in proposals)
    for of_image, (height, width) in zip(proposals, inputs.sizes):  # in the student's pixels, inside the images
        assert (of_image >= 0).all() and (of_image <= torch.tensor([width, height, width, height]) + 1).all()


def test_a_batch_without_objects(source):
    given = source.batch(empty=True)[1:]
    distiller = Distiller(source.build("retinanet"), source.build("retinanet", seed=1), DistillSettings(**OPEN)).train()
    losses = distiller(given)
    assert all(losses[f"distill_{name}"] == 0 for name in ("feature", "classification", "regression"))
    sum(losses.values()).backward()
