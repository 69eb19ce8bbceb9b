"""What is seen of a torchvision detector from outside is what happens inside it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from tardkd import ops
from tardkd.detectors import for_model
from tardkd.detectors.base import Batch, StudentPass

from .tiny import FAMILIES, tiny_batch, tiny_detector

families = pytest.mark.parametrize("family", FAMILIES)


def spy(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """Results of every call of ``owner.name``."""
    results: list[Any] = []
    original = getattr(owner, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        results.append(original(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(owner, name, recorded)
    return results


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def run_student(model: nn.Module, family: str = "faster", **batch: Any) -> StudentPass:
    torch.manual_seed(5)
    return for_model(model).student_pass(Batch(*tiny_batch(family, **batch)))


@families
def test_losses_are_the_models_own(family: str) -> None:
    plain = tiny_detector(family)
    observed = copy.deepcopy(plain)
    torch.manual_seed(5)
    expected = plain(*tiny_batch(family))
    state = torch.get_rng_state()
    losses = run_student(observed, family).losses
    assert list(losses) == list(expected)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    assert torch.equal(torch.get_rng_state(), state)
    sum(expected.values()).backward()
    sum(losses.values()).backward()
    for (name, a), b in zip(plain.named_parameters(), observed.parameters()):
        assert torch.equal(a.grad, b.grad), name


@families
@pytest.mark.parametrize("empty", [False, True])
def test_regions_are_the_sampled_ones(family: str, empty: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_detector(family)
    samples = spy(monkeypatch, model.roi_heads, "select_training_samples")
    student = run_student(model, family, empty=empty)
    [(proposals, _matched, labels, targets)] = samples
    regions = student.regions
    assert regions.counts == [16, 16]
    assert all(torch.equal(a, b) for a, b in zip(regions.proposals, proposals))
    assert torch.equal(regions.labels, torch.cat(labels))
    assert len(regions.labels[:16].unique()) > 1
    foreground = regions.labels > 0
    encoded = model.roi_heads.box_coder.encode([regions.gt_boxes], [torch.cat(proposals)])[0]
    torch.testing.assert_close(encoded[foreground], torch.cat(targets)[foreground])
    assert regions.head.pooled.shape == (32, 8, 3, 3)
    assert set(model.roi_heads.box_roi_pool.map_levels(proposals).tolist()) == {0, 1}
    logits, deltas = model.roi_heads.box_predictor(model.roi_heads.box_head(regions.head.pooled))
    assert torch.equal(regions.head.logits, logits) and torch.equal(regions.head.boxes, deltas)


def test_features_scales_and_inputs() -> None:
    model = tiny_detector(levels=3, first=1)
    student = run_student(model)
    maps = model.backbone(student.inputs.tensor)
    assert len(student.features) == 3
    assert all(torch.equal(a, b) for a, b in zip(student.features, maps.values()))
    assert student.scales == [1 / 2, 1 / 4, 1 / 8]
    assert student.inputs.sizes == [(64, 80), (72, 64)]
    assert all(level.requires_grad for level in student.features)


def test_tardkds_own_pool() -> None:
    plain = tiny_detector(levels=3)
    swapped = copy.deepcopy(plain)
    swapped.roi_heads.box_roi_pool = ops.MultiScaleRoIAlign(["0", "1", "2"], 3, 2, canonical_scale=48)
    expected, student = run_student(plain), run_student(swapped)
    assert student.scales == expected.scales
    torch.testing.assert_close(student.regions.head.pooled, expected.regions.head.pooled)
    assert for_model(swapped).roi == for_model(plain).roi


def test_only_the_box_heads_call_of_a_shared_pool_counts() -> None:
    model = tiny_detector("mask")
    model.roi_heads.mask_roi_pool = model.roi_heads.box_roi_pool
    student = run_student(model, "mask")
    assert student.regions.counts == [16, 16]
    assert len(student.regions.head.pooled) == len(student.regions.head.logits) == 32


def test_levels_of_one_stride() -> None:
    """As torchvision's MobileNet detectors have them: its level rule never leaves the first."""
    model = tiny_detector(levels=2)
    model.backbone.body[2].stride = (1, 1)
    model.roi_heads.box_roi_pool.canonical_scale = 8
    student = run_student(model)
    assert student.scales == [1 / 4]
    assert [tuple(level.shape[-2:]) for level in student.features] == [(24, 24)]
    pooled = ops.multiscale_roi_align(
        student.features, student.regions.proposals, scales=student.scales, output_size=3, canonical_scale=8
    )
    torch.testing.assert_close(pooled, student.regions.head.pooled)
    teacher = teacher_of(copy.deepcopy(model))
    result = teacher.teacher_pass(tiny_batch()[0], student.inputs, 1.0)
    head = teacher.answers(result, student.regions, student.regions.labels - 1)
    assert result.scales == [1 / 4]
    torch.testing.assert_close(head.pooled, student.regions.head.pooled)


def test_unused_levels_are_left_out() -> None:
    model = tiny_detector(levels=3)
    model.roi_heads.box_roi_pool = MultiScaleRoIAlign(["0", "2"], 3, 2)
    student = run_student(model)
    assert [level.shape[-1] for level in student.features] == [24, 6]
    assert student.scales == [1 / 4, 1 / 16]


@families
def test_no_trace_is_left(family: str) -> None:
    model = tiny_detector(family)
    images, _ = tiny_batch(family)
    before = model.eval()(images)
    run_student(model.train(), family)
    assert hooks_of(model) == 0 and "select_training_samples" not in vars(model.roi_heads)
    after = model.eval()(images)
    for a, b in zip(before, after):
        assert list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_no_trace_is_left_by_a_failure() -> None:
    model = tiny_detector()
    images, targets = tiny_batch()
    targets[0]["boxes"] = targets[0]["boxes"][:, [2, 3, 0, 1]]
    with pytest.raises(AssertionError, match="positive height and width"):
        for_model(model).student_pass(Batch(images, targets))
    assert hooks_of(model) == 0 and "select_training_samples" not in vars(model.roi_heads)


def test_settings_are_read_from_the_model() -> None:
    model = tiny_detector(bbox_reg_weights=(1.0, 2.0, 3.0, 4.0), size=96)
    model.roi_heads.box_roi_pool = MultiScaleRoIAlign(["0"], (3, 5), 1, canonical_scale=112, canonical_level=3)
    detector = for_model(model)
    roi = detector.roi
    assert (roi.output_size, roi.sampling_ratio, roi.aligned) == ((3, 5), 1, False)
    assert (roi.canonical_scale, roi.canonical_level) == (112, 3)
    assert detector.head.box_weights == (1.0, 2.0, 3.0, 4.0)
    assert detector.head.widths == (4, 16)
    assert (detector.head.background, detector.head.activation) == ("first", "softmax")
    assert (detector.channels, detector.input_size) == ((8,), 96)


def teacher_of(model: nn.Module) -> Any:
    return for_model(model.eval().requires_grad_(False))


def test_teacher_takes_the_students_batch_where_it_would_make_the_same() -> None:
    student = run_student(tiny_detector())
    images, _ = tiny_batch()
    batch = teacher_of(tiny_detector(seed=1)).teacher_pass(images, student.inputs, 1.0).state[0]
    assert batch.tensors is student.inputs.tensor


@pytest.mark.parametrize(
    "options, ratio",
    [
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.4, 0.3]}, 1.0),
        ({"size": 96}, 1.5),
        ({"size": 32, "image_std": [1.0, 1.0, 1.0]}, 0.5),
    ],
)
def test_teacher_batch_is_what_its_own_transform_makes(options: dict[str, Any], ratio: float) -> None:
    student = run_student(tiny_detector())
    model = tiny_detector(seed=1, **options)
    images, _ = tiny_batch()
    batch = teacher_of(model).teacher_pass(images, student.inputs, ratio).state[0]
    expected, _ = model.transform(images)
    assert batch.image_sizes == expected.image_sizes
    torch.testing.assert_close(batch.tensors, expected.tensors)


def test_teacher_batch_is_padded_as_the_teacher_needs() -> None:
    student = run_student(tiny_detector(size_divisible=16))
    assert student.inputs.tensor.shape[-2:] == (80, 80)
    images, _ = tiny_batch()
    batch = teacher_of(tiny_detector(seed=1)).teacher_pass(images, student.inputs, 1.0).state[0]
    assert batch.tensors.shape[-2:] == (96, 96)
    assert torch.equal(batch.tensors[..., :80, :80], student.inputs.tensor)


@pytest.mark.parametrize("ratio, size", [(1.0, 64), (1.5, 96)])
def test_teacher_head_is_the_teachers_on_its_own_pixels(ratio: float, size: int) -> None:
    student = run_student(tiny_detector())
    model = tiny_detector(seed=1, channels=12, levels=3, size=size)
    images, _ = tiny_batch()
    detector = teacher_of(model)
    teacher = detector.teacher_pass(images, student.inputs, ratio)
    head = detector.answers(teacher, student.regions, student.regions.labels - 1)

    batch, _ = model.transform(images)
    maps = model.backbone(batch.tensors)
    boxes = [boxes * ratio for boxes in student.regions.proposals]
    pooled = model.roi_heads.box_roi_pool(maps, boxes, batch.image_sizes)
    logits, deltas = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    for actual, expected in zip((head.pooled, head.logits, head.boxes), (pooled, logits, deltas)):
        torch.testing.assert_close(actual, expected)
    assert teacher.scales == [ratio / 4, ratio / 8, ratio / 16]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(teacher.features, maps.values()))


@pytest.mark.parametrize("ratio, size", [(1.0, 64), (1.5, 96)])
def test_teacher_proposals_are_its_rpns_in_student_pixels(ratio: float, size: int) -> None:
    student = run_student(tiny_detector())
    model = tiny_detector(seed=1, size=size)
    images, _ = tiny_batch()
    detector = teacher_of(model)
    proposals = detector.teacher_proposals(detector.teacher_pass(images, student.inputs, ratio))
    batch, _ = model.transform(images)
    expected, _ = model.rpn(ImageList(batch.tensors, batch.image_sizes), model.backbone(batch.tensors))
    assert [len(boxes) for boxes in proposals] == [40, 40]
    for boxes, theirs, (height, width) in zip(proposals, expected, student.inputs.sizes):
        torch.testing.assert_close(boxes, theirs / ratio, atol=1e-3, rtol=1e-4)
        assert boxes.min() >= 0 and boxes[:, 2].max() <= width and boxes[:, 3].max() <= height


def test_student_labels_the_teachers_proposals() -> None:
    model = tiny_detector()
    student = run_student(model)
    proposals = [boxes[:10] + 1 for boxes in student.regions.proposals]
    regions = for_model(model).student_regions(student, proposals)
    truth = torch.cat([target["boxes"] for target in student.targets])
    assert regions.counts == [12, 11]  # with the two and the one box of the ground truth
    assert (regions.labels > 0).sum() >= 3
    assert all((regions.gt_boxes[regions.labels > 0] == box).all(1).any() for box in truth)
    assert regions.head.logits.requires_grad and regions.head.pooled.requires_grad


def test_single_map_backbone() -> None:
    class Single(nn.Module):
        out_channels = 8

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, stride=4, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    model = tiny_detector(levels=1)
    model.backbone = Single()
    student = run_student(model)
    assert [tuple(level.shape) for level in student.features] == [(2, 8, 24, 24)]
    teacher = teacher_of(copy.deepcopy(model)).teacher_pass(tiny_batch()[0], student.inputs, 1.0)
    assert torch.equal(teacher.features[0], student.features[0])


def test_autocast_keeps_boxes_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_detector(box_fg_iou_thresh=0.999, box_bg_iou_thresh=0.999)
    samples = spy(monkeypatch, model.roi_heads, "select_training_samples")
    images, targets = tiny_batch()
    for target in targets:
        target["boxes"] = target["boxes"] + 0.3  # more digits than bfloat16 has
    with torch.autocast("cpu", torch.bfloat16):
        student = for_model(model).student_pass(Batch(images, targets))
    assert samples[0][0][0].dtype == torch.bfloat16
    assert torch.equal(student.regions.labels, torch.cat(samples[0][2]))
    assert {boxes.dtype for boxes in student.regions.proposals} == {torch.float32}
    truth = torch.cat([target["boxes"] for target in student.targets])
    foreground = student.regions.gt_boxes[student.regions.labels > 0]
    assert len(foreground) == 3 and all((truth == box).all(1).any() for box in foreground)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        nn.DataParallel(tiny_detector()),
    ],
    ids=["linear", "wrapped"],
)
def test_unknown_family(model: nn.Module) -> None:
    with pytest.raises(TypeError, match=rf"{type(model).__name__}; supported: torchvision's GeneralizedRCNN"):
        for_model(model)
