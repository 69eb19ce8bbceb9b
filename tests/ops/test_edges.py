"""Nothing to do, bad values, misfits: what the ops do at the edges of their domain."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from tolerances import assert_tensors_close, assert_values_close

import tardkd.ops
from tardkd.ops.spec import LossSpec

from .parity import TERMS, assert_losses_match
from .scenes import LEVEL_RULE, make_scene
from .test_pooled_loss import make_pooled

NAN, INF = float("nan"), float("inf")
OPEN = dict(feature_gate="all", classification_gate="all", regression_gate="foreground")


def region_loss(backend, scene, **options):
    return backend.ops.region_distill_loss(*scene.inputs, **{**scene.scales, **LEVEL_RULE, **options})


def pooled_loss(backend, scene, **options):
    pooled = make_pooled(scene, scene.student_logits.dtype, scene.teacher_logits.dtype)
    losses = backend.ops.pooled_distill_loss(*pooled, *scene.per_region, **options)
    return losses, [pooled[0], scene.student_logits, scene.student_deltas]


def assert_connected_zeros(losses, leaves, reduction):
    total = 0
    for term in TERMS:
        loss = getattr(losses, term)
        assert loss.requires_grad, f"{term} is cut off from the graph"
        assert not loss.detach().any()
        assert (loss.dim() == 0) == (reduction != "none")
        total = total + loss.sum()
    assert not losses.gates.any()
    for leaf, gradient in zip(leaves, torch.autograd.grad(total, leaves)):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype
        assert not gradient.any()


# --- nothing to distil ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("listed", [False, True], ids=["tensor", "list"])
def test_no_regions(backend, dtype, reduction, listed):
    scene = make_scene(71, regions=4).rows(slice(0, 0)).to(dtype, device=backend.device)
    losses, leaves = pooled_loss(backend, scene, reduction=reduction)
    assert_connected_zeros(losses, leaves, reduction)
    if listed:
        scene.proposals = [scene.proposals[:, 1:]] * 2
    losses = region_loss(backend, scene, reduction=reduction)
    assert losses.gates.shape == (0, 3) and losses.scores.shape == (0, 4)
    assert_connected_zeros(losses, scene.leaves, reduction)

    options = dict(scales=scene.student_scales)
    pooled = backend.ops.multiscale_roi_align(scene.student_features, scene.proposals, **options)
    assert pooled.shape == (0, 5, 7, 7) and pooled.dtype == dtype
    for gradient in torch.autograd.grad(pooled.sum(), scene.student_features):
        assert not gradient.any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_foreground(backend, reduction):
    scene = make_scene(72).to(torch.float32, device=backend.device)
    scene.labels = torch.zeros_like(scene.labels)
    assert_connected_zeros(region_loss(backend, scene, reduction=reduction), scene.leaves, reduction)
    assert_connected_zeros(*pooled_loss(backend, scene, reduction=reduction), reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_gates_closed_by_ties(backend, reduction):
    """A teacher that says what the student says is not better."""
    scene = make_scene(73).to(torch.float32, device=backend.device)
    scene.teacher_logits, scene.teacher_deltas = scene.student_logits.detach(), scene.student_deltas.detach()
    losses = region_loss(backend, scene, reduction=reduction, regression_gate="vs_student")
    assert_connected_zeros(losses, scene.leaves, reduction)
    assert torch.equal(losses.scores[:, 0], losses.scores[:, 1]) and losses.scores[:, 0].any()
    assert torch.equal(losses.scores[:, 2], losses.scores[:, 3]) and losses.scores[:, 2].any()


def test_a_teacher_that_leaves_the_proposal_alone_is_not_better(backend):
    scene = make_scene(74, regions=100).to(torch.float32, device=backend.device)
    scene.teacher_deltas = torch.zeros_like(scene.teacher_deltas)
    losses = region_loss(backend, scene)
    assert not losses.gates[:, 2].any()
    assert torch.equal(losses.scores[:, 2], losses.scores[:, 3]) and losses.scores[:, 2].any()


def test_no_images(backend):
    scene = make_scene(75, regions=2).rows(slice(0, 0)).to(torch.float32, device=backend.device)
    scene.student_features = [f.detach()[:0].requires_grad_() for f in scene.student_features]
    scene.teacher_features = [f[:0] for f in scene.teacher_features]
    scene.proposals = []
    assert_connected_zeros(region_loss(backend, scene), scene.leaves, "mean")
    loss = backend.ops.gaussian_feature_loss(
        scene.student_features, scene.teacher_features, [], scales=scene.student_scales
    )
    assert loss.item() == 0


# --- regions that are left out --------------------------------------------------------------------------

BAD_REGIONS = {
    "nan corner": ("proposals", 2, NAN),
    "inf corner": ("proposals", 4, INF),
    "minus inf corner": ("proposals", 1, -INF),
    "nan index": ("proposals", 0, NAN),
    "inf index": ("proposals", 0, INF),
    "negative index": ("proposals", 0, -1.0),
    "index beyond the images": ("proposals", 0, 2.0),
    "huge index": ("proposals", 0, 1e30),
    "negative label": ("labels", None, -1),
    "label beyond the classes": ("labels", None, 4),
    "huge label": ("labels", None, 2**40),
    "nan gt box": ("gt_boxes", 3, NAN),
    "inf gt box": ("gt_boxes", 0, INF),
}


def spoil(scene, fault, rows):
    name, column, value = BAD_REGIONS[fault]
    tensor = getattr(scene, name).clone()
    tensor[rows if column is None else (rows, column)] = value
    setattr(scene, name, tensor)


@pytest.mark.parametrize("fault", BAD_REGIONS)
@pytest.mark.parametrize(
    "options",
    [{}, OPEN, dict(OPEN, reduction="none", bin_weight="gaussian")],
    ids=["default", "open", "none"],
)
def test_bad_regions_contribute_nothing(backend, fault, options):
    scene = make_scene(76).to(torch.float64, device=backend.device)
    foreground = (scene.labels > 0).nonzero()[:, 0]
    bad = foreground[[1, 4, 5]]
    spoil(scene, fault, bad)
    keep = torch.ones(len(scene.labels), dtype=torch.bool, device=backend.device)
    keep[bad] = False

    losses = region_loss(backend, scene, **options)
    assert not losses.gates[bad].any()
    assert not losses.scores[bad].any()
    rest = scene.rows(keep)
    expected = region_loss(backend, rest, **options)
    assert torch.equal(losses.gates[keep], expected.gates)
    assert torch.equal(losses.scores[keep], expected.scores)
    for term in TERMS:
        loss, target = getattr(losses, term), getattr(expected, term)
        if options.get("reduction") == "none":
            assert not loss[bad].any()
            loss = loss[keep]
        assert_values_close(loss, target, torch.float64, term)
    gradients, targets = (
        torch.autograd.grad(sum(loss.sum() for loss in result[:3]), scene.leaves) for result in (losses, expected)
    )
    for gradient, target in zip(gradients, targets):
        assert_tensors_close(gradient, target, torch.float64)
    assert not gradients[-2][bad].any() and not gradients[-1][bad].any()


@pytest.mark.parametrize("fault", [name for name in BAD_REGIONS if "index" not in name])
def test_bad_regions_contribute_nothing_to_the_pooled_form(backend, fault):
    scene = make_scene(77).to(torch.float64, device=backend.device)
    pooled = make_pooled(scene, torch.float64, torch.float64)
    bad = (scene.labels > 0).nonzero()[:, 0][[0, 3]]
    spoil(scene, fault, bad)
    keep = torch.ones(len(scene.labels), dtype=torch.bool, device=backend.device)
    keep[bad] = False
    losses = backend.ops.pooled_distill_loss(*pooled, *scene.per_region, **OPEN)
    kept = scene.rows(keep).per_region
    expected = backend.ops.pooled_distill_loss(pooled[0][keep], pooled[1][keep], *kept, **OPEN)
    assert not losses.gates[bad].any() and not losses.scores[bad].any()
    for term in TERMS:
        assert_values_close(getattr(losses, term), getattr(expected, term), torch.float64, term)
    (gradient,) = torch.autograd.grad(losses.feature, pooled[0])
    assert not gradient[bad].any()


@pytest.mark.parametrize("fault", [name for name in BAD_REGIONS if BAD_REGIONS[name][0] == "proposals"])
def test_bad_regions_pool_to_zero(backend, fault):
    scene = make_scene(78).to(torch.float64, device=backend.device)

    def pool(proposals):
        options = dict(scales=scene.student_scales, **LEVEL_RULE)
        return backend.ops.multiscale_roi_align(scene.student_features, proposals, **options)

    keep = torch.ones(len(scene.labels), dtype=torch.bool, device=backend.device)
    keep[[0, 2, 9]] = False
    expected = pool(scene.proposals[keep])
    spoil(scene, fault, ~keep)
    actual = pool(scene.proposals)
    assert torch.equal(actual[keep], expected) and not actual[~keep].any()
    gradients, targets = (torch.autograd.grad(x.sum(), scene.student_features) for x in (actual, expected))
    for gradient, target in zip(gradients, targets):
        assert_tensors_close(gradient, target, torch.float64)


def test_all_regions_bad(backend):
    scene = make_scene(79).to(torch.float32, device=backend.device)
    scene.proposals = scene.proposals * NAN
    assert_connected_zeros(region_loss(backend, scene, **OPEN), scene.leaves, "mean")


def test_the_gt_boxes_of_background_are_ignored(backend):
    scene = make_scene(80).to(torch.float32, device=backend.device)
    expected = region_loss(backend, scene, bin_weight="gaussian", **OPEN)
    scene.gt_boxes[scene.labels == 0] = NAN
    actual = region_loss(backend, scene, bin_weight="gaussian", **OPEN)
    for got, want in zip(actual, expected):
        assert torch.equal(got, want)


def test_no_gradient_leaks_from_closed_regions(backend):
    """NaN in the features under closed regions, and in their logits and deltas, reaches nothing."""
    scene = make_scene(81, images=1).to(torch.float32, device=backend.device)
    left = torch.tensor([4.0, 8.0, 60.0, 80.0], device=backend.device)
    right = torch.tensor([100.0, 8.0, 156.0, 80.0], device=backend.device)
    opened = torch.arange(len(scene.labels), device=backend.device) % 2 == 0
    boxes = torch.where(opened[:, None], left, right)
    scene.proposals = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)
    scene.gt_boxes = boxes + 1
    scene.labels = torch.where(opened, 1, 0)
    for feature in (*scene.student_features, *scene.teacher_features):
        feature.data[..., feature.shape[3] * 9 // 16 :] = NAN
    for head in scene.heads:
        head.data[~opened] = NAN
    gates = dict(feature_gate="foreground", classification_gate="foreground", regression_gate="foreground")
    losses = region_loss(backend, scene, **gates)
    assert losses.gates.tolist() == [[bool(o)] * 3 for o in opened]
    for term in TERMS:
        assert getattr(losses, term).isfinite() and getattr(losses, term) > 0
    for leaf, gradient in zip(scene.leaves, torch.autograd.grad(sum(losses[:3]), scene.leaves)):
        assert gradient.isfinite().all()
        assert not gradient[leaf.isnan()].any()


def test_nan_of_open_regions_is_not_hidden(backend):
    scene = make_scene(82).to(torch.float32, device=backend.device)
    for feature in scene.student_features:
        feature.data.fill_(NAN)
    scene.student_deltas.data.fill_(NAN)
    losses = region_loss(backend, scene, **OPEN)
    assert losses.feature.isnan() and losses.regression.isnan()
    assert losses.classification.isfinite()
    assert losses.scores.isfinite().all()


def test_nan_of_a_head_closes_its_gate_and_shows_in_the_scores(backend):
    """A teacher that went wrong must not pass for one that is merely worse."""
    scene = make_scene(83).to(torch.float32, device=backend.device)
    scene.teacher_deltas[::2] = NAN
    scene.teacher_logits[::3] = NAN
    losses = region_loss(backend, scene)
    foreground = scene.labels > 0
    assert not losses.gates[::2, 2].any() and not losses.gates[::3, 1].any()
    assert losses.gates[:, 2].any() and losses.gates[:, 1].any()
    assert torch.equal(losses.scores[::2, 2].isnan(), foreground[::2])
    assert losses.scores[::3, 0].isnan().all()
    assert losses.scores[1::2, 2].isfinite().all() and losses.scores[:, [1, 3]].isfinite().all()
    assert all(loss.isfinite() for loss in losses[:3])
    for gradient in torch.autograd.grad(sum(losses[:3]), scene.leaves):
        assert gradient.isfinite().all()


# --- boxes of odd shapes --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_inverted_boxes(backend, layout):
    """Without ``aligned`` they count as one map pixel, as in torchvision."""
    scene = make_scene(84).to(torch.float64, None, layout, layout, device=backend.device)
    scene.proposals = scene.proposals[:, [0, 3, 4, 1, 2]]
    assert_losses_match(backend.ops, scene, feature_gate="all", classification_gate="all")


@pytest.mark.parametrize("aligned", [False, True], ids=["legacy", "aligned"])
@pytest.mark.parametrize("size", [1e3, 1e6, 1e12, 1e30])
def test_huge_boxes(backend, size, aligned):
    scene = make_scene(85).to(torch.float64, device=backend.device)
    boxes = scene.proposals[:, 1:]
    boxes[0] = torch.tensor([-size, -size, size, size])
    boxes[1] = torch.tensor([size, size, 2 * size, 2 * size])
    boxes[2] = torch.tensor([-2 * size, 0, -size, 50])
    boxes[3] = torch.tensor([0, -size, 50, size])
    assert_losses_match(backend.ops, scene, feature_gate="all", classification_gate="all", aligned=aligned)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("maps", [(1, 1), (1, 9), (2, 1)], ids=str)
def test_tiny_maps(backend, maps, sampling_ratio):
    scene = make_scene(86, geometry="single").to(torch.float64, device=backend.device)
    scene.student_features = [scene.student_features[0].detach()[..., : maps[0], : maps[1]].requires_grad_()]
    scene.teacher_features = [scene.teacher_features[0][..., : maps[0], : maps[1]]]
    assert_losses_match(backend.ops, scene, feature_gate="all", sampling_ratio=sampling_ratio)


def test_gt_boxes_without_area(backend):
    scene = make_scene(87).to(torch.float64, device=backend.device)
    scene.gt_boxes[:, 2:] = scene.gt_boxes[:, :2]
    losses = region_loss(backend, scene, bin_weight="gaussian", feature_gate="foreground")
    assert losses.gates[:, 0].any() and not losses.gates[:, 2].any()
    assert losses.feature == 0 and not losses.scores[:, 2:].any()


def test_extreme_logits(backend):
    scene = make_scene(88).to(torch.float32, device=backend.device)
    for logits in (scene.student_logits, scene.teacher_logits):
        logits.data *= 300
    assert_losses_match(backend.ops, scene, classification_gate="all")
    scene = make_scene(88, activation="sigmoid").to(torch.float32, device=backend.device)
    for logits in (scene.student_logits, scene.teacher_logits):
        logits.data *= 300
    assert_losses_match(backend.ops, scene, classification_gate="all", activation="sigmoid")


def test_classes_masked_out_on_both_sides(backend):
    """A class without mass adds nothing: 0 log 0 = 0."""
    scene = make_scene(97, classes=4).to(torch.float64, device=backend.device)
    rest = scene.replace(num_classes=3)
    for name in ("student_logits", "teacher_logits"):
        setattr(rest, name, getattr(scene, name).detach()[:, :4].requires_grad_(name.startswith("student")))
        getattr(scene, name).data[:, 4] = -INF
    for name in ("student_deltas", "teacher_deltas"):
        setattr(rest, name, getattr(scene, name).detach()[:, :16].requires_grad_(name.startswith("student")))
    scene.labels.clamp_(max=3)
    losses, expected = (region_loss(backend, s, **OPEN) for s in (scene, rest))
    assert_values_close(losses.classification, expected.classification, torch.float64)
    (gradient,) = torch.autograd.grad(losses.classification, scene.student_logits)
    (target,) = torch.autograd.grad(expected.classification, rest.student_logits)
    assert_tensors_close(gradient[:, :4], target, torch.float64)
    assert not gradient[:, 4].any()


def test_weights_of_closed_regions_are_not_looked_at(backend):
    scene = make_scene(98).to(torch.float32, device=backend.device)
    foreground = dict(feature_gate="foreground", classification_gate="foreground", regression_gate="foreground")
    expected = region_loss(backend, scene, region_weights=scene.region_weights, **foreground)
    weights = torch.where(scene.labels > 0, scene.region_weights, NAN)
    actual = region_loss(backend, scene, region_weights=weights, **foreground)
    for got, want in zip(actual, expected):
        assert torch.equal(got, want)
    for gradient in torch.autograd.grad(sum(actual[:3]), scene.leaves):
        assert gradient.isfinite().all()


def test_samples_outside_the_map_read_nothing(backend):
    """Their place is taken by the border in the bilinear form; its NaN must not be multiplied by zero."""
    feature = torch.full((1, 2, 8, 8), NAN, device=backend.device)
    feature[..., 2:6, 2:6] = 1
    boxes = torch.tensor([[0, 20.0, 20.0, 30.0, 30.0], [0, -30.0, 2.0, -3.0, 6.0]], device=backend.device)
    pooled = backend.ops.multiscale_roi_align([feature], boxes, scales=[1.0], output_size=2)
    assert not pooled.any()


def test_weights_of_zero_and_below(backend):
    scene = make_scene(89).to(torch.float64, device=backend.device)
    weights = scene.region_weights - 1
    weights[::4] = 0
    assert_losses_match(backend.ops, scene, region_weights=weights, **OPEN)


# --- more than 2^31 elements ------------------------------------------------------------------------------


def test_offsets_beyond_31_bits(host, tmp_path):
    """Sparse files stand in for the memory: only the pages that the region touches exist."""
    images, side = 3, 2**15
    count = images * side * side
    assert count > 2**31
    student, teacher = (
        torch.from_file(str(tmp_path / name), shared=True, size=count, dtype=torch.bfloat16).view(images, 1, side, side)
        for name in ("student", "teacher")
    )
    student[2:, :, -40:, -40:] = torch.arange(1600.0).view(40, 40) / 16
    low = side - 40
    boxes = torch.tensor([[2, low + 3.0, low + 5.0, low + 30.0, low + 21.0]])
    near, near_boxes = student[2:, :, -40:, -40:].clone(), boxes - torch.tensor([2.0, low, low, low, low])

    options = dict(scales=[1.0], canonical_scale=1e6)
    expected = host.ops.multiscale_roi_align([near], near_boxes, **options)
    assert expected.any() and torch.equal(host.ops.multiscale_roi_align([student], boxes, **options), expected)

    scene = make_scene(99, regions=1).to(torch.bfloat16)
    rest = (*(head.detach() for head in scene.heads), scene.labels, scene.gt_boxes)
    options = dict(student_scales=[1.0], canonical_scale=1e6, **OPEN)
    expected = host.ops.region_distill_loss([near], [torch.zeros_like(near)], near_boxes, *rest, **options)
    actual = host.ops.region_distill_loss([student], [teacher], boxes, *rest, **options)
    assert expected.feature > 0 and torch.equal(actual.feature, expected.feature)


# --- TARDKD_CHECK=1 ---------------------------------------------------------------------------------------

REASONS = {"proposals": "proposal is not finite|image index", "labels": "label", "gt_boxes": "gt box"}


@pytest.mark.parametrize("fault", BAD_REGIONS)
def test_checked_on_request(backend, fault, monkeypatch):
    monkeypatch.setenv("TARDKD_CHECK", "1")
    scene = make_scene(90).to(torch.float32, device=backend.device)
    region_loss(backend, scene)
    pooled_loss(backend, scene)
    row = int((scene.labels > 0).nonzero()[2])
    later = int((scene.labels > 0).nonzero()[5])
    spoil(scene, fault, torch.tensor([row, later]))
    name = BAD_REGIONS[fault][0]
    message = rf"region {row}: .*({REASONS[name]})"
    with pytest.raises(ValueError, match=message):
        region_loss(backend, scene)
    if "index" not in fault:
        with pytest.raises(ValueError, match=message):
            pooled_loss(backend, scene)
    if name == "proposals":
        with pytest.raises(ValueError, match=message):
            backend.ops.multiscale_roi_align(scene.student_features, scene.proposals, scales=scene.student_scales)
        with pytest.raises(ValueError, match=message):
            backend.ops.shared_roi_align(
                scene.student_features, scene.teacher_features, scene.proposals, **scene.scales
            )


def test_gt_boxes_as_xywh_are_named_on_request(backend, monkeypatch):
    monkeypatch.setenv("TARDKD_CHECK", "1")
    scene = make_scene(93).to(torch.float32, device=backend.device)
    scene.gt_boxes[:] = torch.tensor([50.0, 10.0, 70.0, 30.0])
    scene.gt_boxes[scene.labels == 0] = 0  # those of background regions carry no meaning
    region_loss(backend, scene)
    row = int((scene.labels > 0).nonzero()[1])
    scene.gt_boxes[row] = torch.tensor([50.0, 10.0, 20.0, 30.0])
    message = (
        rf"region {row}: its gt box has x2 <= x1 or y2 <= y1 .*\[x, y, width, height\].*: \[50.0, 10.0, 20.0, 30.0\]"
    )
    for loss in (region_loss, pooled_loss):
        with pytest.raises(ValueError, match=message):
            loss(backend, scene)


def test_the_first_bad_region_is_named_whatever_its_fault(backend, monkeypatch):
    monkeypatch.setenv("TARDKD_CHECK", "1")
    scene = make_scene(91).to(torch.float32, device=backend.device)
    scene.proposals[9, 1] = NAN
    scene.labels[7] = -3
    with pytest.raises(ValueError, match=r"region 7: .*label"):
        region_loss(backend, scene)


def test_checked_boxes_of_the_gaussian_loss(backend, monkeypatch):
    monkeypatch.setenv("TARDKD_CHECK", "1")
    scene = make_scene(92).to(torch.float32, device=backend.device)
    gt_boxes = [torch.zeros(2, 4), torch.tensor([[0, 0, 9, 9], [0, 0, INF, 9]])]
    with pytest.raises(ValueError, match=r"gt_boxes\[1\]: box 1"):
        backend.ops.gaussian_feature_loss(
            scene.student_features,
            scene.teacher_features,
            [boxes.to(backend.device) for boxes in gt_boxes],
            scales=scene.student_scales,
        )


# --- misfits ----------------------------------------------------------------------------------------------


def wider(tensor, by=1):
    return torch.cat([tensor, tensor[:, :by]], 1).detach()


def wanting_grad(tensor):
    return tensor.clone().requires_grad_()


# What to change in the scene, the error, and what it must name (both sides).
MISFITS = {
    "channels": (
        lambda s: dict(teacher_features=[wider(f) for f in s.teacher_features]),
        ValueError,
        r"student_features have 5 channels but teacher_features have 6",
    ),
    "images": (
        lambda s: dict(teacher_features=[f[:1] for f in s.teacher_features]),
        ValueError,
        r"student_features have 2 images but teacher_features have 1",
    ),
    "channels of one level": (
        lambda s: dict(student_features=[s.student_features[0], wider(s.student_features[1])]),
        ValueError,
        r"student_features\[1\] .*6 channels.* student_features\[0\] .*5 channels",
    ),
    "dtype of one level": (
        lambda s: dict(student_features=[*s.student_features[:3], s.student_features[3].bfloat16()]),
        TypeError,
        r"student_features\[3\] is torch.bfloat16 but student_features\[0\] is torch.float32",
    ),
    "student scales": (
        lambda s: dict(student_scales=s.student_scales[:3]),
        ValueError,
        r"student_scales has 3 scales but student_features has 4 levels",
    ),
    "teacher scales": (
        lambda s: dict(teacher_scales=[*s.teacher_scales, 1 / 64]),
        ValueError,
        r"teacher_scales has 5 scales but teacher_features has 4 levels",
    ),
    "scales that are not": (
        lambda s: dict(student_scales=[1, 0.5, 0, 0.1]),
        ValueError,
        r"student_scales .*positive",
    ),
    "no levels": (
        lambda s: dict(student_features=[], student_scales=[]),
        ValueError,
        r"student_features .*level",
    ),
    "one map for a pyramid": (
        lambda s: dict(student_features=s.student_features[0]),
        TypeError,
        r"student_features must be a list",
    ),
    "axes of a map": (
        lambda s: dict(teacher_features=[f[0] for f in s.teacher_features]),
        ValueError,
        r"teacher_features\[0\] .*N, C, H, W.* \(5,",
    ),
    "integer maps": (
        lambda s: dict(teacher_features=[f.int() for f in s.teacher_features]),
        TypeError,
        r"teacher_features\[0\] .*torch.int32",
    ),
    "empty maps": (
        lambda s: dict(teacher_features=[f[:, :, :0] for f in s.teacher_features]),
        ValueError,
        r"teacher_features\[0\] is an empty map",
    ),
    "precision of the sides": (
        lambda s: dict(teacher_features=[f.double() for f in s.teacher_features]),
        TypeError,
        r"teacher_features is torch.float64 but student_features is torch.float32",
    ),
    "precision of a head": (
        lambda s: dict(teacher_logits=s.teacher_logits.double()),
        TypeError,
        r"teacher_logits is torch.float64 but student_features is torch.float32",
    ),
    "device of the sides": (
        lambda s: dict(teacher_features=[f.to("meta") for f in s.teacher_features]),
        ValueError,
        r"teacher_features is on meta but student_features is on (cpu|cuda)",
    ),
    "device of a head": (
        lambda s: dict(student_logits=s.student_logits.to("meta")),
        ValueError,
        r"student_logits is on meta but student_features is on (cpu|cuda)",
    ),
    "device of the proposals": (
        lambda s: dict(proposals=s.proposals.to("meta")),
        ValueError,
        r"proposals are on meta .*(cpu|cuda)",
    ),
    "device of the labels": (
        lambda s: dict(labels=s.labels.to("meta")),
        ValueError,
        r"labels is on meta but student_features is on (cpu|cuda)",
    ),
    "columns of proposals": (
        lambda s: dict(proposals=s.proposals[:, 1:]),
        ValueError,
        r"proposals must have shape \(R, 5\).* \(32, 4\)",
    ),
    "half proposals": (lambda s: dict(proposals=s.proposals.half()), TypeError, r"proposals .*torch.float16"),
    "lists of proposals": (
        lambda s: dict(proposals=[s.proposals[:, 1:]]),
        ValueError,
        r"proposals has boxes for 1 images but the features have 2",
    ),
    "columns in a list of proposals": (
        lambda s: dict(proposals=[s.proposals[:, 1:], s.proposals[:0]]),
        ValueError,
        r"proposals\[1\] must have shape \(R, 4\)",
    ),
    "rows of logits": (
        lambda s: dict(teacher_logits=s.teacher_logits[:-1]),
        ValueError,
        r"teacher_logits has 31 rows but proposals hold 32 regions",
    ),
    "rows of deltas": (
        lambda s: dict(student_deltas=s.student_deltas[:-1]),
        ValueError,
        r"student_deltas has 31 rows but proposals hold 32 regions",
    ),
    "rows of labels": (lambda s: dict(labels=s.labels[:5]), ValueError, r"labels has 5 rows .* 32 regions"),
    "rows of gt boxes": (
        lambda s: dict(gt_boxes=s.gt_boxes[:5]),
        ValueError,
        r"gt_boxes has 5 rows .* 32 regions",
    ),
    "rows of weights": (
        lambda s: dict(region_weights=s.region_weights[:5]),
        ValueError,
        r"region_weights has 5 rows .* 32 regions",
    ),
    "classes": (
        lambda s: dict(teacher_logits=wider(s.teacher_logits)),
        ValueError,
        r"student_logits have 4 columns but teacher_logits have 5",
    ),
    "columns of student deltas": (
        lambda s: dict(student_deltas=wider(s.student_deltas, 4)),
        ValueError,
        r"student_deltas have 20 columns.* 3 .* 4, 12 or 16",
    ),
    "columns of teacher deltas": (
        lambda s: dict(teacher_deltas=s.teacher_deltas[:, :8]),
        ValueError,
        r"teacher_deltas have 8 columns.* 3 .* 4, 12 or 16",
    ),
    "no class": (
        lambda s: dict(student_logits=s.student_logits[:, :1], teacher_logits=s.teacher_logits[:, :1]),
        ValueError,
        r"no foreground class",
    ),
    "axes of labels": (lambda s: dict(labels=s.labels[:, None]), ValueError, r"labels .*\(R\).* \(32, 1\)"),
    "dtype of labels": (lambda s: dict(labels=s.labels.int()), TypeError, r"labels .*int64.* torch.int32"),
    "columns of gt boxes": (
        lambda s: dict(gt_boxes=s.gt_boxes[:, :3]),
        ValueError,
        r"gt_boxes .*\(R, 4\).* \(32, 3\)",
    ),
    "integer gt boxes": (lambda s: dict(gt_boxes=s.gt_boxes.long()), TypeError, r"gt_boxes .*torch.int64"),
    "no tensor": (lambda s: dict(labels=s.labels.tolist()), TypeError, r"labels must be a tensor.* list"),
    "grad of teacher features": (
        lambda s: dict(teacher_features=[*s.teacher_features[:3], wanting_grad(s.teacher_features[3])]),
        ValueError,
        r"teacher_features\[3\] requires grad.*detach",
    ),
    "grad of teacher logits": (
        lambda s: dict(teacher_logits=wanting_grad(s.teacher_logits)),
        ValueError,
        r"teacher_logits requires grad.*detach",
    ),
    "grad of teacher deltas": (
        lambda s: dict(teacher_deltas=wanting_grad(s.teacher_deltas)),
        ValueError,
        r"teacher_deltas requires grad.*detach",
    ),
    "grad of weights": (
        lambda s: dict(region_weights=wanting_grad(s.region_weights)),
        ValueError,
        r"region_weights requires grad.*detach",
    ),
}


def test_more_levels_than_the_kernels_have_room_for(backend):
    scene = make_scene(100).to(torch.float32, device=backend.device)
    with pytest.raises(ValueError, match="at most 8 levels, got 9"):
        backend.ops.multiscale_roi_align([scene.student_features[0]] * 9, scene.proposals, scales=[0.25] * 9)


@pytest.mark.parametrize("misfit", MISFITS)
def test_misfits_are_refused_by_name(backend, misfit):
    change, error, message = MISFITS[misfit]
    scene = make_scene(93).to(torch.float32, device=backend.device)
    region_loss(backend, scene, region_weights=scene.region_weights)  # as it is, it fits
    scene = scene.replace(**change(scene))
    with pytest.raises(error, match=message):
        region_loss(backend, scene, region_weights=scene.region_weights)
    if not re.search("images|levels|scales|maps|map|level|channels|sides|lists|teacher features", misfit):
        pooled = make_pooled(make_scene(93))
        with pytest.raises(error, match=message.replace("student_features", "student_(features|pooled)")):
            backend.ops.pooled_distill_loss(*pooled, *scene.per_region, region_weights=scene.region_weights)


POOLED_MISFITS = {
    "channels": (
        lambda s, t: (s, wider(t)),
        ValueError,
        r"student_pooled have 6 channels but teacher_pooled have 7",
    ),
    "regions": (
        lambda s, t: (s, t[:-1]),
        ValueError,
        r"student_pooled have 32 regions but teacher_pooled have 31",
    ),
    "both": (
        lambda s, t: (s[:3], t[:3]),
        ValueError,
        r"student_pooled has 3 rows but proposals hold 32 regions",
    ),
    "bins": (
        lambda s, t: (s, t[..., :5]),
        ValueError,
        r"student_pooled .*\(32, 6, 7, 7\).*teacher_pooled .*7, 5\)",
    ),
    "axes": (
        lambda s, t: (s.flatten(1), t.flatten(1)),
        ValueError,
        r"student_pooled .*R, C, h, w.* \(32, 294\)",
    ),
    "precision": (
        lambda s, t: (s, t.double()),
        TypeError,
        r"teacher_pooled is torch.float64 but student_pooled",
    ),
    "grad": (lambda s, t: (s, wanting_grad(t)), ValueError, r"teacher_pooled requires grad.*detach"),
}


@pytest.mark.parametrize("misfit", POOLED_MISFITS)
def test_misfits_of_pooled_features(backend, misfit):
    change, error, message = POOLED_MISFITS[misfit]
    scene = make_scene(94).to(torch.float32, device=backend.device)
    with pytest.raises(error, match=message):
        backend.ops.pooled_distill_loss(*change(*make_pooled(scene)), *scene.per_region)


GAUSSIAN_MISFITS = {
    "shapes": (
        lambda s: dict(teacher_features=[f[..., :-1] for f in s.teacher_features]),
        ValueError,
        r"student_features\[0\] has shape \(2, 5, 24, 40\) but teacher_features\[0\] .*\(2, 5, 24, 39\)",
    ),
    "levels": (
        lambda s: dict(teacher_features=s.teacher_features[:2]),
        ValueError,
        r"4 scales but teacher_features has 2 levels",
    ),
    "images": (lambda s: dict(gt_boxes=s.gt_boxes[:1]), ValueError, r"gt_boxes has boxes for 1 images .* 2"),
    "columns": (
        lambda s: dict(gt_boxes=[b[:, :3] for b in s.gt_boxes]),
        ValueError,
        r"gt_boxes\[0\] .*\(R, 4\)",
    ),
    "a tensor": (lambda s: dict(gt_boxes=s.gt_boxes[0]), TypeError, r"gt_boxes must be a list"),
    "device": (
        lambda s: dict(gt_boxes=[b.to("meta") for b in s.gt_boxes]),
        ValueError,
        r"gt_boxes .*meta.* (cpu|cuda)",
    ),
    "grad": (
        lambda s: dict(teacher_features=[wanting_grad(f) for f in s.teacher_features]),
        ValueError,
        r"teacher_features\[0\] requires grad.*detach",
    ),
    "sigma": (lambda s: dict(sigma_squared=0.0), ValueError, r"sigma_squared must be positive, got 0"),
}


@pytest.mark.parametrize("misfit", GAUSSIAN_MISFITS)
def test_misfits_of_the_gaussian_loss(backend, misfit):
    change, error, message = GAUSSIAN_MISFITS[misfit]
    scene = make_scene(95).to(torch.float32, device=backend.device)
    scene.gt_boxes = [torch.zeros(3, 4), torch.zeros(0, 4)]
    arguments = dict(
        student_features=scene.student_features,
        teacher_features=scene.teacher_features,
        gt_boxes=scene.gt_boxes,
        scales=scene.student_scales,
    )
    with pytest.raises(error, match=message):
        backend.ops.gaussian_feature_loss(**{**arguments, **change(scene)})


@pytest.mark.parametrize(
    "option, value",
    [
        ("feature_loss", "l2"),
        ("bin_weight", "gauss"),
        ("feature_gate", "teacher_better"),
        ("classification_gate", "either"),
        ("regression_gate", "all"),
        ("background", "none"),
        ("background", 0),
        ("activation", "relu"),
        ("reduction", "average"),
        ("reduction", None),
        ("box_coding", "corners"),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", NAN),
        ("beta", -0.1),
        ("box_weights", (10.0, 10.0, 5.0)),
        ("box_weights", (10.0, 10.0, 5.0, 0.0)),
        ("output_size", 0),
        ("output_size", (7, 7, 7)),
        ("output_size", 2**31),
        ("sampling_ratio", 10**7),
        ("sampling_ratio", 2**40),
        ("temperature", INF),
        ("beta", NAN),
        ("box_weights", (10.0, 10.0, 5.0, NAN)),
        ("canonical_scale", 0),
        ("canonical_scale", -224),
        ("canonical_scale", INF),
        ("canonical_level", 2**31),
        ("student_scales", (0.25, NAN, 0.1, 0.1)),
        ("student_scales", (INF, 0.5, 0.25, 0.1)),
    ],
)
def test_options_that_are_none(backend, option, value):
    scene = make_scene(96).to(torch.float32, device=backend.device)
    shown = "nan|inf" if option == "student_scales" else re.escape(str(value))
    with pytest.raises(ValueError, match=rf"{option} must .*({shown})"):
        region_loss(backend, scene, **{option: value})
    if option in LossSpec._fields:
        with pytest.raises(ValueError, match=rf"{option} must .*({shown})"):
            pooled_loss(backend, scene, **{option: value})


@pytest.mark.parametrize(
    "option, value",
    [
        ("output_size", 7.0),
        ("output_size", "77"),
        ("sampling_ratio", 2.0),
        ("canonical_level", 4.0),
        ("canonical_scale", "large"),
        ("temperature", "hot"),
    ],
)
def test_options_of_another_type(backend, option, value):
    scene = make_scene(96).to(torch.float32, device=backend.device)
    with pytest.raises(TypeError, match=rf"{option} must be an? (int|number), got"):
        region_loss(backend, scene, **{option: value})


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor], ids=["int64", "uint8", "tensor"])
def test_integers_of_other_kinds(backend, number):
    scene = make_scene(97).to(torch.float32, device=backend.device)
    expected = region_loss(backend, scene, output_size=5, sampling_ratio=2, canonical_level=4)
    options = dict(output_size=number(5), sampling_ratio=number(2), canonical_level=number(4))
    assert torch.equal(region_loss(backend, scene, **options).feature, expected.feature)
    options["output_size"] = (number(5), number(5))
    assert torch.equal(region_loss(backend, scene, **options).feature, expected.feature)


def test_boxes_too_large_for_float32_count_as_not_finite(backend):
    """The squares of their sides are not finite in float64 either."""
    scene = make_scene(98).to(torch.float64, device=backend.device)
    for size in (1e39, 1e154, 1e300):
        huge = scene.replace(proposals=scene.proposals.double(), gt_boxes=scene.gt_boxes.double())
        huge.proposals[::2, 1:] *= size
        rows = torch.arange(1, len(huge.labels), 2, device=backend.device)
        losses = region_loss(backend, huge, reduction="sum", feature_gate="all")
        expected = region_loss(backend, huge.rows(rows), reduction="sum", feature_gate="all")
        assert not losses.gates[::2].any()
        for loss, target in zip(losses[:3], expected[:3]):
            torch.testing.assert_close(loss, target)
        gt_boxes = [huge.gt_boxes * size, huge.gt_boxes]
        others = [f.detach() + 1 for f in huge.student_features]
        options = dict(scales=huge.student_scales)
        loss = backend.ops.gaussian_feature_loss(huge.student_features, others, gt_boxes, **options)
        target = backend.ops.gaussian_feature_loss(
            huge.student_features, others, [gt_boxes[0][:0], gt_boxes[1]], **options
        )
        assert loss.isfinite() and torch.equal(loss, target)


def test_tensors_without_data():
    scene = make_scene(99).to(torch.float32)
    scene = scene.to(torch.float32, device="meta")
    losses = tardkd.ops.region_distill_loss(*scene.inputs, **scene.scales)
    assert losses.feature.shape == () and losses.gates.shape == (32, 3)
    gradients = torch.autograd.grad(sum(losses[:3]), scene.leaves)
    assert [g.shape for g in gradients] == [leaf.shape for leaf in scene.leaves]
    pooled = tardkd.ops.multiscale_roi_align(scene.student_features, scene.proposals, scales=scene.student_scales)
    assert pooled.shape == (32, 5, 7, 7) and pooled.is_meta
