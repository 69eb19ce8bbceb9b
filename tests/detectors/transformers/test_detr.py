"""DETR and Deformable DETR as students and teachers: what is not as with RT-DETR."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from transformers import DeformableDetrImageProcessor, DetrImageProcessor, ResNetConfig
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.loss.loss_for_object_detection import HungarianMatcher

from detectors.tiny import tiny_batch, tiny_detector
from tardkd.detectors import for_model
from tardkd.detectors.transformers import DeformableDetrDetector, DetrDetector
from tardkd.distill import Distiller, DistillSettings

from .tiny import tiny_call, tiny_detr, tiny_query_detector

NAMES = ["a", "b", "c"]
OPEN = {"feature_gate": "foreground", "classification_gate": "foreground", "regression_gate": "foreground"}
MATCHERS = {"detr": HungarianMatcher, "deformable_detr": DeformableDetrHungarianMatcher}
kinds = pytest.mark.parametrize("kind", MATCHERS)


def seeded(function: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(5)
    return function(*args, **kwargs)


@kinds
@pytest.mark.parametrize("empty", [False, True])
def test_the_output_is_the_models_own_with_the_terms_in_its_loss(kind, empty):
    student = tiny_detr(kind).train()
    both = Distiller(copy.deepcopy(student), tiny_detr(kind, seed=1), DistillSettings(**OPEN)).train()
    plain, output = (seeded(model, **tiny_call(empty=empty)) for model in (student, both))
    assert torch.equal(output.logits, plain.logits) and type(output) is type(plain)
    terms = {name: value for name, value in output.loss_dict.items() if name not in plain.loss_dict}
    assert list(terms) == ["distill_feature", "distill_classification", "distill_regression"]
    assert all(value > 0 for value in terms.values())
    torch.testing.assert_close(output.loss, plain.loss + sum(terms.values()))
    output.loss.backward()
    assert all(weight.grad is not None for weight in both.parameters() if weight.requires_grad)
    assert all(weight.grad is None for weight in both.teacher.parameters())


@kinds
def test_regions_are_the_queries_that_the_models_loss_used(kind, monkeypatch):
    model = tiny_detr(kind).train()
    detector = for_model(model)
    assert type(detector) is {"detr": DetrDetector, "deformable_detr": DeformableDetrDetector}[kind]
    matches, forward = [], MATCHERS[kind].forward

    def record(self: Any, *args: Any) -> Any:
        matches.append(forward(self, *args))
        return matches[-1]

    monkeypatch.setattr(MATCHERS[kind], "forward", record)
    call = tiny_call()
    passed = detector.student_pass(detector.read_call(**call))
    assert len(matches) == 2  # the model's loss, and ours
    for (queries, objects), (again, same) in zip(*matches):
        assert queries.equal(again) and objects.equal(same)
    rows = torch.cat([queries for queries, _ in matches[0]])
    regions = passed.regions
    assert regions.head.logits.shape[1] == detector.head.widths[0] == (4 if kind == "detr" else 3)
    assert torch.equal(regions.head.logits, passed.output.logits[regions.image_of_row(), rows])
    labels = [target["class_labels"][chosen] for target, (_, chosen) in zip(call["labels"], matches[0])]
    assert torch.equal(regions.labels, torch.cat(labels))
    assert bool(regions.foreground(detector.head).all())


@kinds
@pytest.mark.parametrize("size", [(64, 96), (70, 90)])
def test_maps_are_the_encoders_sequence_place_by_place(kind, size):
    model = tiny_detr(kind).eval()
    detector = for_model(model)
    call = detector.read_call(**tiny_call(size=size))
    with torch.no_grad():
        output = model(pixel_values=call.inputs.tensor)
        maps = detector.maps(output, call.inputs)
    assert [level.shape[1] for level in maps] == list(detector.channels)
    shapes = [tuple(-(-side // int(stride)) for side in size) for stride in detector.strides]
    assert [tuple(level.shape[-2:]) for level in maps] == shapes
    flat = torch.cat([level.flatten(2) for level in maps], dim=2).transpose(1, 2)
    assert torch.equal(flat, output.encoder_last_hidden_state)


def test_a_backbone_of_other_strides_is_named():
    stages = ["stage1", "stage2", "stage3"]
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic", out_features=stages
    )
    detector = for_model(tiny_detr("deformable_detr", backbone_config=backbone).train())
    with pytest.raises(ValueError, match="this DeformableDetrForObjectDetection has .* places .* of other strides"):
        detector.student_pass(detector.read_call(**tiny_call()))


@kinds
def test_detections_are_those_of_the_library(kind):
    model = tiny_detr(kind).eval()
    detector = type(for_model(model))(model, min_size=64, max_size=128)
    images = [torch.rand(3, 64, 96), torch.rand(3, 96, 96)]
    with torch.no_grad():
        found = detector.detect(images)
        inputs = detector.preparation.batch(images, torch.float32)
        output = detector.run(inputs)
        alone = detector.deployable()([images[0]])[0]
        again = detector.detect(images[:1])[0]
    processor = DetrImageProcessor() if kind == "detr" else DeformableDetrImageProcessor()
    options = {} if kind == "detr" else {"top_k": 12}
    spans = [(inputs.tensor.shape[-2], inputs.tensor.shape[-1])] * 2
    expected = processor.post_process_object_detection(output, threshold=0.0, target_sizes=spans, **options)
    for one, other in zip(found, expected):
        assert one["labels"].equal(other["labels"] + 1)
        torch.testing.assert_close(one["scores"], other["scores"])
    for name, value in again.items():
        torch.testing.assert_close(alone[name], value, rtol=1e-4, atol=1e-4)


@kinds
@pytest.mark.parametrize("other", ["faster_rcnn", "rt_detr"])
def test_other_families_teach_and_are_taught(kind, other):
    images, targets = tiny_batch()
    ours, theirs = tiny_detr(kind), tiny_detector(num_classes=4) if other == "faster_rcnn" else tiny_query_detector()
    for student, teacher in ((ours, theirs), (theirs, ours)):
        models = copy.deepcopy((student, teacher))
        sides = [type(for_model(m))(m, min_size=64) if hasattr(m, "config") else m for m in models]
        both = Distiller(*sides, DistillSettings(**OPEN), student_classes=NAMES, teacher_classes=NAMES).train()
        losses = both(images, targets)
        assert all(losses[f"distill_{name}"] > 0 for name in ("feature", "classification", "regression"))
        torch.stack(list(losses.values())).sum().backward()


@kinds
def test_class_tensors_are_those_of_another_size_for_other_classes(kind):
    few, many = tiny_detr(kind), tiny_detr(kind, num_labels=5)
    state, other = few.state_dict(), many.state_dict()
    differing = {name for name, value in state.items() if value.shape != other[name].shape}
    assert differing == {name for name in state if name.startswith(for_model(few).class_tensors)} and differing
    assert all(isinstance(part, torch.nn.Module) for part in for_model(few).heads)
