"""What is seen of torchvision's one-stage detectors from outside is what happens inside them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.ops import clip_boxes_to_image

from tardkd.detectors import for_model
from tardkd.detectors.base import Batch, StudentPass
from tardkd.distill import Distiller, DistillSettings

from .tiny import DENSE, TinyBackbone, tiny_batch, tiny_dense, tiny_detector

families = pytest.mark.parametrize("family", DENSE)
NAMES = ["a", "b", "c"]


def run_student(model: nn.Module, **batch: Any) -> StudentPass:
    return for_model(model).student_pass(Batch(*tiny_batch(**batch)))


def assignments(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The arguments of the call that compares the head with the objects it was assigned."""
    calls: list[tuple] = []
    owner = model if isinstance(model, SSD) else model.head
    original = type(owner).compute_loss

    def compute_loss(self: Any, *args: Any) -> Any:
        calls.append(args)
        return original(self, *args)

    monkeypatch.setattr(type(owner), "compute_loss", compute_loss)
    return calls


@families
@pytest.mark.parametrize("empty", [False, True])
def test_losses_are_the_models_own_and_no_trace_is_left(family: str, empty: bool) -> None:
    plain = tiny_dense(family)
    observed = copy.deepcopy(plain)
    expected = plain(*tiny_batch(empty=empty))
    losses = run_student(observed, empty=empty).losses
    assert list(losses) == list(expected) and all(torch.equal(losses[name], expected[name]) for name in expected)
    sum(expected.values()).backward()
    sum(losses.values()).backward()
    for (name, a), b in zip(plain.named_parameters(), observed.parameters()):
        assert torch.equal(a.grad, b.grad), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in observed.modules())
    assert not any("compute_loss" in vars(module) for module in observed.modules())


@families
@pytest.mark.parametrize("empty", [False, True])
def test_regions_are_the_positives_of_the_models_own_loss(
    family: str, empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_dense(family)
    calls = assignments(model, monkeypatch)
    student = run_student(model, empty=empty)
    [(targets, outputs, anchors, matched)] = calls
    regions = student.regions
    assert regions.counts == [int((of_image >= 0).sum()) for of_image in matched] and regions.counts[0] > 0
    row = 0
    for image, (target, of_image) in enumerate(zip(targets, matched)):
        for anchor in (of_image >= 0).nonzero().flatten().tolist():
            assert regions.rows[row] == anchor
            assert regions.labels[row] == target["labels"][of_image[anchor]]
            assert torch.equal(regions.gt_boxes[row], target["boxes"][of_image[anchor]])
            place = regions.gt_boxes[row] if family == "fcos" else anchors[image][anchor]
            assert torch.equal(regions.boxes[row], place)
            logits = outputs["cls_logits"][image, anchor]
            assert torch.equal(regions.head.logits[row], logits if family == "ssd" else logits[1:])
            row += 1
    assert row == len(regions.labels)
    assert regions.foreground(for_model(model).head).all()
    if family == "fcos":
        centerness = torch.cat([outputs["bbox_ctrness"][i, m >= 0, 0] for i, m in enumerate(matched)])
        torch.testing.assert_close(regions.head.quality, centerness.sigmoid())


@families
def test_boxes_are_those_that_the_model_detects(family: str) -> None:
    """The detections with the scores of the regions have their boxes, clipped."""
    model = tiny_dense(family, score_thresh=0.0, nms_thresh=1.0, detections_per_img=10**5, topk_candidates=10**5)
    images, targets = tiny_batch()
    images, targets = images[:1], [{**targets[0]}]
    student = for_model(model).student_pass(Batch(images, targets))
    height, width = student.inputs.sizes[0]
    with torch.no_grad():
        (found,) = model.eval()(images)
    scale = torch.tensor([images[0].shape[-1] / width, images[0].shape[-2] / height] * 2)
    boxes = clip_boxes_to_image(student.regions.head.boxes.detach(), (height, width)) * scale
    logits = student.regions.head.logits.detach()
    scores = logits.softmax(1)[:, 1:] if family == "ssd" else logits.sigmoid()
    if family == "fcos":
        scores = (scores * student.regions.head.quality[:, None]).sqrt()
    for box, of_classes in zip(boxes, scores):
        for label, score in enumerate(of_classes, start=1):
            same = (found["labels"] == label) & ((found["scores"] - score).abs() < 1e-5)
            assert (found["boxes"][same] - box).abs().amax(1).min() < 1e-2


@families
def test_levels_are_those_whose_maps_the_rows_count_through(family: str) -> None:
    model = tiny_dense(family, levels=3)
    student = run_student(model)
    counts = [
        level.shape[-2] * level.shape[-1] * per_place
        for level, per_place in zip(student.features, model.anchor_generator.num_anchors_per_location())
    ]
    names = torch.arange(3).repeat_interleave(torch.tensor(counts))
    assert torch.equal(student.regions.levels, names[student.regions.rows]) and len(student.regions.levels.unique()) > 1


def test_scales() -> None:
    student = run_student(tiny_dense("retinanet", levels=3))
    assert student.scales == [1 / 4, 1 / 8, 1 / 16]
    student = run_student(tiny_dense("ssd", levels=3))
    assert student.scales == [8 / 64, 3 / 64, 1 / 64]
    assert for_model(tiny_dense("ssd", levels=3)).channels == (8, 12, 16)


def answered(model: nn.Module, student: StudentPass, ratio: float = 1.0) -> tuple[Any, Any]:
    detector = for_model(model.eval().requires_grad_(False))
    teacher = detector.teacher_pass(tiny_batch()[0], student.inputs, ratio)
    return teacher, detector.answers(teacher, student.regions, student.regions.labels - 1)


@families
def test_a_teacher_with_the_same_grid_answers_in_the_same_rows(family: str) -> None:
    student = run_student(tiny_dense(family))
    model = tiny_dense(family, seed=1)
    teacher, head = answered(model, student)
    assert teacher.grid == student.regions.grid
    outputs = model.head(list(model.backbone(student.inputs.tensor).values()))
    anchors = model.anchor_generator(for_images(student), teacher.features)
    images = student.regions.image_of_row()
    for row, (image, place) in enumerate(zip(images.tolist(), student.regions.rows.tolist())):
        logits = outputs["cls_logits"][image, place]
        assert torch.equal(head.logits[row], logits if family == "ssd" else logits[1:])
        regression = outputs["bbox_regression"][image, place][None]
        coder = model.box_coder
        decode = coder.decode if family == "fcos" else coder.decode_single
        torch.testing.assert_close(head.boxes[row], decode(regression, anchors[image][place][None])[0])


def for_images(student: StudentPass) -> Any:
    from torchvision.models.detection.image_list import ImageList

    return ImageList(student.inputs.tensor, student.inputs.sizes)


@families
@pytest.mark.parametrize("options, ratio", [({"levels": 3}, 1.0), ({}, 1.5), ({"generator": True}, 1.0)])
def test_a_teacher_with_another_grid_answers_by_object(family: str, options: dict[str, Any], ratio: float) -> None:
    student = run_student(tiny_dense(family))
    options = dict(options)
    changed = options.pop("generator", False)
    model = tiny_dense(family, seed=1, **options)
    if changed:
        generator = model.anchor_generator
        if family == "ssd":
            generator.clip = False
        else:
            generator.sizes = tuple(tuple(size + 1 for size in level) for level in generator.sizes)
    teacher, head = answered(model, student, ratio)
    assert teacher.grid != student.regions.grid
    # All regions of an object get the same answer, in the student's pixels: on the image, or not far from it.
    questions = torch.cat([student.regions.gt_boxes, student.regions.image_of_row()[:, None].float()], dim=1)
    answers = [head.boxes[(questions == question).all(1)] for question in questions.unique(dim=0)]
    assert len(answers) == 3 and all((boxes == boxes[0]).all() for boxes in answers)


def test_a_teacher_of_a_larger_input_speaks_in_the_students_pixels() -> None:
    """Of the same images at twice the size, and twice the anchors, the boxes would be the same."""
    student = run_student(tiny_dense("retinanet"))
    model = tiny_dense("retinanet", seed=1, size=128)
    detector = for_model(model.eval().requires_grad_(False))
    teacher = detector.teacher_pass(tiny_batch()[0], student.inputs, 2.0)
    assert teacher.scales == [1 / 2, 1 / 4]
    state = teacher.state
    own = model.box_coder.decode_single(state.outputs["bbox_regression"].flatten(0, 1), state.anchors.flatten(0, 1))
    head = detector.answers(teacher, student.regions, student.regions.labels - 1)
    assert all(((own / 2 - box).abs().amax(1) < 1e-4).any() for box in head.boxes)


@pytest.mark.parametrize("teacher", [*DENSE, "faster"])
@pytest.mark.parametrize("student", [*DENSE, "faster"])
def test_any_of_them_teaches_any_other(student: str, teacher: str) -> None:
    def build(family: str, seed: int) -> nn.Module:
        return tiny_detector(seed=seed) if family == "faster" else tiny_dense(family, seed=seed)

    distiller = Distiller(
        build(student, 0),
        build(teacher, 1),
        student_classes=NAMES,
        teacher_classes=NAMES,
    )
    for empty in (False, True):
        losses = distiller(*tiny_batch(empty=empty))
        assert all(value.isfinite() for value in losses.values())
        assert losses["distill_classification"].requires_grad
        sum(losses.values()).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in distiller.parameters())
    assert all(weight.grad is None for weight in distiller.teacher.parameters())


@families
def test_a_batch_without_objects_gives_zeros_of_the_graph(family: str) -> None:
    images, targets = tiny_batch()
    targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    distiller = Distiller(tiny_dense(family), tiny_dense(family, seed=1), DistillSettings())
    losses = distiller(images, targets)
    terms = [value for name, value in losses.items() if name.startswith("distill")]
    assert len(terms) == 3 and all(value == 0 and value.requires_grad for value in terms)
    sum(losses.values()).backward()


@families
def test_autocast_and_double(family: str) -> None:
    model = tiny_dense(family)
    with torch.autocast("cpu", torch.bfloat16):
        student = run_student(model)
    assert student.regions.boxes.dtype == student.regions.head.boxes.dtype == torch.float32
    exact = run_student(tiny_dense(family))
    if family != "fcos":  # the anchors are exact, though those of autocast were not
        rows = {
            (int(i), int(r)): box
            for i, r, box in zip(exact.regions.image_of_row(), exact.regions.rows, exact.regions.boxes)
        }
        for image, row, box in zip(student.regions.image_of_row(), student.regions.rows, student.regions.boxes):
            if (int(image), int(row)) in rows:
                torch.testing.assert_close(box, rows[int(image), int(row)])
    images, targets = tiny_batch()
    targets = [{**target, "boxes": target["boxes"].double()} for target in targets]
    double = for_model(tiny_dense(family).double()).student_pass(Batch([image.double() for image in images], targets))
    assert double.regions.head.boxes.dtype == torch.float64


def test_subclasses_and_bare_maps() -> None:
    class Mine(RetinaNet):
        pass

    class Bare(TinyBackbone):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)["0"]

    model = tiny_dense("retinanet", kind=Mine, levels=1)
    assert run_student(model).regions.counts[0] > 0
    model.backbone.__class__ = Bare
    assert len(run_student(model).features) == 1
    assert isinstance(for_model(tiny_dense("fcos")).model, FCOS)


@families
def test_class_tensors_are_those_of_another_size_for_other_classes(family: str) -> None:
    three, five = tiny_dense(family, num_classes=4), tiny_dense(family, num_classes=6)
    differing = {name for name, value in three.state_dict().items() if value.shape != five.state_dict()[name].shape}
    prefixes = for_model(three).class_tensors
    assert differing == {name for name in three.state_dict() if name.startswith(prefixes)} != set()


@families
def test_cut_down_to_some_classes_it_says_of_these_what_it_said(family: str) -> None:
    whole, part = tiny_dense(family, num_classes=6).eval(), tiny_dense(family, num_classes=3, seed=1).eval()
    part.load_state_dict(for_model(part).of_classes(whole.state_dict(), [0, 4, 2], 6))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        said, cut = (m.head(list(m.backbone(image).values()))["cls_logits"] for m in (whole, part))
    torch.testing.assert_close(cut, said[..., [0, 4, 2]])
