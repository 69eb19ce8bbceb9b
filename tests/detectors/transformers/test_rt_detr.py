"""RT-DETR, RT-DETRv2 and D-FINE as students and teachers: what the model itself would have said and done."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch

from detectors.tiny import tiny_batch, tiny_detector

pytest.importorskip("transformers")

from transformers import RTDetrImageProcessor
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

from detectors.transformers.tiny import KINDS, tiny_call, tiny_query_detector
from tardkd.detectors import find, for_model
from tardkd.detectors.transformers import RTDetrDetector
from tardkd.distill import Distiller, DistillSettings

NAMES = ["a", "b", "c"]


def seeded(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A call with the same random numbers as any other one: the noise of the denoising queries is drawn."""
    torch.manual_seed(7)
    return function(*args, **kwargs)


def distiller(kind: str = "rt_detr", **options: Any) -> Distiller:
    student, teacher = tiny_query_detector(kind), tiny_query_detector(kind, seed=1, num_queries=8)
    return Distiller(student, teacher, **options).train()


# --- which models are known -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_known_by_its_class(kind):
    assert isinstance(find(tiny_query_detector(kind)), RTDetrDetector)


def test_a_class_that_derives_from_one_is_known_too():
    model = tiny_query_detector()
    model.__class__ = type("Mine", (type(model),), {"__module__": "mine"})
    assert isinstance(find(model), RTDetrDetector)


def test_a_model_without_detections_is_not_known():
    assert find(tiny_query_detector().model) is None


def test_nobody_who_does_not_use_transformers_imports_it():
    code = (
        "import sys, torch, tardkd.detectors.transformers as family; from tardkd.detectors import find;"
        "assert find(torch.nn.Linear(1, 1)) is None and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the student ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_models_own_with_the_terms_in_its_loss(kind, empty):
    both = distiller(kind)
    call = tiny_call(empty=empty)
    plain = seeded(copy.deepcopy(both.student), **call)
    output = seeded(both, **call)
    assert type(output) is type(plain) and output.keys() == plain.keys()
    assert torch.equal(output.logits, plain.logits) and torch.equal(output.pred_boxes, plain.pred_boxes)
    terms = {name: value for name, value in output.loss_dict.items() if name not in plain.loss_dict}
    assert list(terms) == ["distill_feature", "distill_classification", "distill_regression"]
    assert all(torch.equal(output.loss_dict[name], value) for name, value in plain.loss_dict.items())
    torch.testing.assert_close(output.loss, plain.loss + sum(terms.values()))
    output.loss.backward()
    assert all(parameter.grad is None for parameter in both.teacher.parameters())
    assert both.student.model.backbone.model.embedder.embedder[0].convolution.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_teacher_it_is_the_model(kind):
    model = tiny_query_detector(kind).train()
    plain = seeded(copy.deepcopy(model), **tiny_call())
    output = seeded(Distiller(model, None, enabled=False), **tiny_call())
    assert torch.equal(output.loss, plain.loss) and output.loss_dict.keys() == plain.loss_dict.keys()


def test_in_eval_mode_it_is_the_model():
    both = distiller().eval()
    assert torch.equal(both(**tiny_call()).loss, both.student(**tiny_call()).loss)


def test_a_tuple_is_returned_where_one_is_asked_for():
    both = distiller()
    plain = seeded(copy.deepcopy(both.student), **tiny_call(), return_dict=False)
    output = seeded(both, **tiny_call(), return_dict=False)
    assert isinstance(output, tuple) and len(output) == len(plain)
    assert output[0] >= plain[0] and torch.equal(output[2], plain[2])  # loss, loss_dict, logits


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_regions_are_the_queries_that_the_models_loss_used(kind, empty, monkeypatch):
    detector = for_model(tiny_query_detector(kind).train())
    matches, forward = [], RTDetrHungarianMatcher.forward

    def record(self: Any, outputs: Any, targets: Any) -> Any:
        matches.append(forward(self, outputs, targets))
        return matches[-1]

    monkeypatch.setattr(RTDetrHungarianMatcher, "forward", record)
    call = tiny_call(empty=empty)
    passed = seeded(detector.student_pass, detector.read_call(**call))
    regions = passed.regions
    rows = torch.cat([queries for queries, _ in matches[0]])
    assert regions.counts == [2, 0 if empty else 1]
    objects = [target["class_labels"][chosen] for target, (_, chosen) in zip(call["labels"], matches[0])]
    assert regions.labels.tolist() == torch.cat(objects).tolist()
    # Logits and boxes are those of the library's post-processing, without its sorting.
    output, first = passed.output, passed.output.logits.shape[1] - 12
    width = torch.tensor([96.0, 64.0, 96.0, 64.0])
    centre, size = output.pred_boxes[:, first:, :2], output.pred_boxes[:, first:, 2:]
    boxes = torch.cat([centre - size / 2, centre + size / 2], dim=2) * width
    images = regions.image_of_row()
    torch.testing.assert_close(regions.head.boxes, boxes[images, rows])
    assert torch.equal(regions.head.logits, output.logits[:, first:][images, rows])
    assert regions.head.boxes.requires_grad and regions.boxes.equal(regions.gt_boxes)
    if not empty:
        assert sorted(regions.gt_boxes.int().tolist()) == [[9, 9, 48, 41], [24, 12, 72, 51], [52, 25, 81, 51]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_objects_gives_zeros_that_reach_the_student(kind):
    both = distiller(kind)
    call = tiny_call()
    call["labels"] = [tiny_call(empty=True)["labels"][1]] * 2
    output = both(**call)
    assert [output.loss_dict[f"distill_{name}"].item() for name in ("feature", "classification", "regression")] == [
        0
    ] * 3
    output.loss.backward()


def test_a_mask_tells_the_images_from_the_padding():
    mask = torch.zeros(2, 64, 96)
    mask[0, :64, :80], mask[1, :40, :96] = 1, 1
    batch = for_model(tiny_query_detector()).read_call(**tiny_call(), pixel_mask=mask)
    assert batch.inputs.sizes == [(64, 80), (40, 96)]
    assert [tuple(image.shape) for image in batch.images] == [(3, 64, 80), (3, 40, 96)]


def test_images_are_what_they_were_before_the_normalisation():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    detector = RTDetrDetector(tiny_query_detector(), mean=mean, std=std)
    pixels = torch.rand(2, 3, 64, 96)
    normalised = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    images = detector.read_call(pixel_values=normalised, labels=tiny_call()["labels"]).images
    torch.testing.assert_close(torch.stack(images), pixels)


@pytest.mark.parametrize("call", [{}, {"pixel_values": torch.rand(1, 3, 64, 64)}])
def test_a_call_without_images_or_labels_is_an_error(call):
    with pytest.raises(ValueError, match="RTDetrForObjectDetection that trains is called with pixel_values"):
        distiller()(**call)


# --- called as torchvision's detectors ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_targets_give_losses_that_add_up_to_the_models(kind):
    model = tiny_query_detector(kind).train()
    detector = RTDetrDetector(model, min_size=64, max_size=80)
    images, targets = tiny_batch()
    call = detector.read_call(images, targets).call
    # 64 x 80 stays, 72 x 64 becomes 72 x 64 too, as 80 is only the most: both are padded to multiples of 32.
    assert call["pixel_values"].shape == (2, 3, 96, 96)
    torch.testing.assert_close(call["pixel_values"][0, :, :64, :80], images[0])
    assert not call["pixel_values"][0, :, 64:].any() and not call["pixel_values"][0, :, :, 80:].any()
    assert [labels["class_labels"].tolist() for labels in call["labels"]] == [[0, 2], [1]]
    first = torch.tensor([23.0, 26.0, 34.0, 36.0]) / 96
    torch.testing.assert_close(call["labels"][0]["boxes"][0], first)

    plain = seeded(copy.deepcopy(model), **call)
    losses = seeded(Distiller(detector, None, enabled=False), images, targets)
    torch.testing.assert_close(sum(losses.values()), plain.loss)
    kinds = {"loss_vfl", "loss_bbox", "loss_giou"} | ({"loss_fgl", "loss_ddf"} if kind == "d_fine" else set())
    assert losses.keys() == kinds
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2
    losses = Distiller(detector, None, enabled=False)(images, nothing)
    assert losses.keys() == kinds
    sum(losses.values()).backward()
    waiting = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not waiting  # DDP would, for a gradient


@pytest.mark.parametrize("label", [0, 4])
def test_labels_beside_images_count_from_one(label):
    images, targets = tiny_batch()
    targets[1]["labels"][0] = label
    with pytest.raises(ValueError, match=f"image 1: box 0 has the label {label}; .* labels from 1 to 3"):
        distiller()(images, targets)


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_those_of_the_library(kind):
    model = tiny_query_detector(kind).eval()
    image = torch.rand(3, 48, 64)
    (found,) = RTDetrDetector(model, min_size=96, max_size=128).detect([image])
    pixels = torch.nn.functional.interpolate(image[None], (96, 128), mode="bilinear", align_corners=False)
    (expected,) = RTDetrImageProcessor().post_process_object_detection(
        model(pixel_values=pixels), threshold=0.0, target_sizes=[(48, 64)]
    )
    assert found["labels"].tolist() == (expected["labels"] + 1).tolist()
    torch.testing.assert_close(found["scores"], expected["scores"])
    limits = torch.tensor([64.0, 48.0, 64.0, 48.0])
    torch.testing.assert_close(found["boxes"], expected["boxes"].clamp(min=0).minimum(limits))


# --- the teacher ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_gives_its_best_for_each_object(kind, ratio):
    model = tiny_query_detector(kind, seed=1).eval()
    detector, call = for_model(model), tiny_call()
    inputs = detector.read_call(**call).inputs
    pixels = torch.nn.functional.interpolate(
        call["pixel_values"], scale_factor=ratio, mode="bilinear", align_corners=False
    )
    with torch.no_grad():
        output = model(pixel_values=pixels)
        passed = detector.teacher_pass(list(call["pixel_values"]), inputs, ratio)
        student = for_model(tiny_query_detector(seed=9).train())
        regions = student.student_pass(student.read_call(**call)).regions
        answers = detector.answers(passed, regions, regions.labels)
    centre, size = output.pred_boxes[..., :2], output.pred_boxes[..., 2:]
    boxes = torch.cat([centre - size / 2, centre + size / 2], dim=2) * torch.tensor([96.0, 64.0, 96.0, 64.0])
    for row, image in enumerate([0, 0, 1]):
        wanted, offered = regions.gt_boxes[row], boxes[image]
        shared = torch.minimum(wanted[2:], offered[:, 2:]) - torch.maximum(wanted[:2], offered[:, :2])
        shared = shared.clamp(min=0).prod(1)
        areas = (wanted[2:] - wanted[:2]).prod() + (offered[:, 2:] - offered[:, :2]).prod(1)
        merit = output.logits[image, :, regions.labels[row]].sigmoid() * (shared / (areas - shared)) ** 2
        torch.testing.assert_close(answers.logits[row], output.logits[image, merit.argmax()])
        torch.testing.assert_close(answers.boxes[row], offered[merit.argmax()])
    for level, expected in zip(passed.features, output.encoder_last_hidden_state):
        torch.testing.assert_close(level, expected)


def test_a_teacher_with_other_values_makes_a_batch_of_its_own():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    model = tiny_query_detector(seed=1).eval()
    images, targets = tiny_batch()
    student = RTDetrDetector(tiny_query_detector().train(), min_size=64, max_size=80)
    passed = student.student_pass(student.read_call(images, targets))
    with torch.no_grad():
        theirs = RTDetrDetector(model, mean=mean, std=std).teacher_pass(images, passed.inputs, 1.0)
        pixels = passed.inputs.tensor.clone()
        for image, (height, width) in zip(pixels, passed.inputs.sizes):
            inner = image[:, :height, :width]
            inner.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])
        expected = model(pixel_values=pixels).encoder_last_hidden_state
    for level, of_model in zip(theirs.features, expected):
        torch.testing.assert_close(level, of_model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_is_left_without_a_trace(kind):
    both = distiller(kind)
    model = both.teacher
    model.config.anchor_image_size = [32, 32]  # smaller than its inputs are
    before = {name: (dict(vars(module)), len(module._forward_hooks)) for name, module in model.named_modules()}
    both(**tiny_call())
    assert model.config.anchor_image_size == [32, 32]
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name][0].keys() and len(module._forward_hooks) == before[name][1]


# --- the pair -------------------------------------------------------------------------------------------------------


def test_other_families_teach_and_are_taught():
    images, targets = tiny_batch()
    ours, theirs = tiny_query_detector(), tiny_detector(num_classes=4)
    names = {"student_classes": NAMES, "teacher_classes": NAMES}
    for student, teacher in ((ours, theirs), (theirs, ours)):
        both = Distiller(copy.deepcopy(student), copy.deepcopy(teacher), **names).train()
        losses = both(images, targets)
        assert all(value.isfinite() for value in losses.values()) and losses["distill_classification"].requires_grad
        sum(losses.values()).backward()
        assert both.stats["foreground"] > 0


def test_a_teacher_of_another_kind_and_width_gets_an_adapter():
    student, teacher = tiny_query_detector("rt_detr_v2"), tiny_query_detector("d_fine", seed=1, channels=24)
    both = Distiller(student, teacher, DistillSettings(feature_gate="all", gaussian=1.0)).train()
    both(**tiny_call()).loss.backward()
    assert both.adapters["feature"].weight.shape == (24, 16, 1, 1)
    assert both.adapters["feature"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_and_copies(kind):
    both = copy.deepcopy(distiller(kind, settings=DistillSettings(teacher_bf16=True)))
    with torch.autocast("cpu", torch.bfloat16):
        output = both(**tiny_call())
    assert output.loss.isfinite()
    output.loss.backward()


def test_double_precision():
    student, teacher = (tiny_query_detector(seed=seed, num_denoising=0).double() for seed in (0, 1))
    call = tiny_call()
    call["pixel_values"] = call["pixel_values"].double()
    call["labels"] = [{**target, "boxes": target["boxes"].double()} for target in call["labels"]]
    output = Distiller(student, teacher).train()(**call)
    assert output.loss.dtype == torch.float64 and output.loss.isfinite()


def test_a_step_is_deterministic():
    losses = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            both = distiller()
            output = seeded(both, **tiny_call())
            output.loss.backward()
            losses.append((output.loss, both.student.model.enc_score_head.weight.grad))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(losses[0][0], losses[1][0]) and torch.equal(losses[0][1], losses[1][1])


@pytest.mark.parametrize("size", [(64, 64), (50, 90)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_deployed_detects_the_same(kind, size):
    model = tiny_query_detector(kind, anchor_image_size=[32, 32]).eval()
    detector = type(for_model(model))(model, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), min_size=64)
    image = torch.rand(3, *size)
    with torch.no_grad():
        [expected] = detector.detect([image])
        [found] = detector.deployable()([image])
    assert found.keys() == expected.keys() and len(expected["scores"]) == 12
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    assert model.config.anchor_image_size == [32, 32]
