"""The reference itself: against torchvision, loops written from the formulas, and numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.detection._utils import BoxCoder

from tardkd.ops import reference

from .parity import TERMS
from .scenes import LEVEL_RULE, make_scene

TIGHT = dict(rtol=1e-12, atol=1e-13)


# --- RoIAlign ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_size", [(1, 1), (7, 7), (2, 5)], ids=str)
@pytest.mark.parametrize("aligned", [False, True], ids=["legacy", "aligned"])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 5])
@pytest.mark.parametrize("scale", [1 / 4, 1 / 16, 0.37])
def test_roi_align_is_torchvisions(scale, sampling_ratio, aligned, output_size):
    scene = make_scene(61, geometry="single")
    proposals = scene.proposals.double()
    feature = scene.student_features[0].requires_grad_()
    options = dict(output_size=output_size, sampling_ratio=sampling_ratio, aligned=aligned)
    expected = torchvision.ops.roi_align(feature, proposals, spatial_scale=scale, **options)
    actual = reference.multiscale_roi_align([feature], proposals, scales=[scale], **options)
    torch.testing.assert_close(actual, expected, **TIGHT)
    upstream = torch.randn_like(expected)
    for gradient, target in zip(*(torch.autograd.grad(x, feature, upstream) for x in (actual, expected))):
        torch.testing.assert_close(gradient, target, **TIGHT)


@pytest.mark.parametrize("rule", [(224, 4), (56, 4), (30, 3), (100, 2)], ids=str)
@pytest.mark.parametrize("geometry", ["equal", "strides", "single", "repeated"])
def test_pyramid_and_level_rule_are_torchvisions(geometry, rule):
    scene = make_scene(62, geometry=geometry, regions=64)
    features = [f.requires_grad_() for f in scene.teacher_features]
    names = [str(level) for level in range(len(features))]
    pooler = torchvision.ops.MultiScaleRoIAlign(names, 7, 2, canonical_scale=rule[0], canonical_level=rule[1])
    proposals = [scene.proposals[scene.proposals[:, 0] == n, 1:] for n in range(2)]
    wide = [boxes.double() for boxes in proposals]
    expected = pooler(dict(zip(names, features)), wide, [(96, 160)] * 2)
    assert pooler.scales == scene.teacher_scales
    options = dict(scales=scene.teacher_scales, canonical_scale=rule[0], canonical_level=rule[1])
    for given in (proposals, wide):
        torch.testing.assert_close(reference.multiscale_roi_align(features, given, **options), expected, **TIGHT)


@pytest.mark.parametrize("side", [55.99999, 56.0, 111.99999, 112.0, 223.99999, 224.0, 447.99999, 448.0])
def test_levels_at_their_borders(side):
    boxes = torch.tensor([[0.0, 0.0, side, side], [1.0, 3.0, 1 + side / 2, 3 + 2 * side]])
    mapper = torchvision.ops.poolers.initLevelMapper(2, 5)
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    assert reference.region_levels(boxes, scales, 224, 4).tolist() == mapper([boxes]).tolist()


def test_a_constant_pools_to_itself_and_a_slope_to_its_centre():
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    feature = torch.stack([torch.full_like(rows, 3.0), rows, columns]).double()[None]
    pooled = reference.multiscale_roi_align(
        [feature], torch.tensor([[0, 8.0, 4.0, 24.0, 20.0]]), scales=[0.5], output_size=2, canonical_scale=1e6
    )
    assert pooled[0].tolist() == [
        [[3.0, 3.0], [3.0, 3.0]],
        [[4.0, 4.0], [8.0, 8.0]],  # rows 2 to 10 in two bins, centred on 4 and 8
        [[6.0, 10.0], [6.0, 10.0]],
    ]


# --- boxes, classes, terms ------------------------------------------------------------------------------


def test_decode_is_torchvisions():
    generator = torch.Generator().manual_seed(1)
    boxes = torch.rand(50, 4, generator=generator, dtype=torch.float64) * 100
    boxes[:, 2:] += boxes[:, :2]
    deltas = 20 * torch.randn(50, 4, generator=generator, dtype=torch.float64)  # many beyond the clamp
    for weights in ((10.0, 10.0, 5.0, 5.0), (1.0, 2.0, 3.0, 4.0)):
        expected = BoxCoder(weights).decode_single(deltas, boxes)
        torch.testing.assert_close(reference.decode(deltas, boxes, weights), expected, **TIGHT)


def test_zero_deltas_decode_to_the_box_itself():
    """Exactly, for float32 boxes: else a teacher that leaves a proposal alone could seem to move it."""
    boxes = make_scene(63, regions=200).proposals[:, 1:]
    decoded = reference.decode(torch.zeros(200, 4), boxes, (10.0, 10.0, 5.0, 5.0))
    assert torch.equal(decoded, boxes.double())


def test_iou_is_torchvisions():
    generator = torch.Generator().manual_seed(2)
    first, second = torch.rand(2, 200, 4, generator=generator, dtype=torch.float64) * 50
    first[:, 2:] += first[:, :2]
    second[:, 2:] += second[:, :2]
    expected = torchvision.ops.box_iou(first, second).diagonal()
    assert (expected == 0).any() and (expected > 0.3).any()
    torch.testing.assert_close(reference.pairwise_iou(first, second), expected, **TIGHT)


def test_iou_of_nothing_is_zero_and_of_nan_is_nan():
    boxes = torch.tensor([[5.0, 5.0, 5.0, 5.0], [9.0, 9.0, 7.0, 8.0], [float("nan"), 0.0, 1.0, 1.0]])
    empty, inverted, unknown = reference.pairwise_iou(boxes, boxes).tolist()
    assert empty == inverted == 0 and math.isnan(unknown)
    against = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert reference.pairwise_iou(boxes[2:], against).isnan().all()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_is_kl_div(temperature):
    student, teacher = torch.randn(2, 30, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3
    expected = F.kl_div(
        F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1), reduction="none"
    ).sum(1)
    actual = reference.divergence(teacher, student, temperature, "softmax")
    torch.testing.assert_close(actual, temperature**2 * expected, **TIGHT)

    pairs = [torch.stack([x, torch.zeros_like(x)], -1) / temperature for x in (student, teacher)]  # sigmoid as softmax
    expected = F.kl_div(F.log_softmax(pairs[0], -1), F.log_softmax(pairs[1], -1), log_target=True, reduction="none")
    actual = reference.divergence(teacher, student, temperature, "sigmoid")
    torch.testing.assert_close(actual, temperature**2 * expected.sum((1, 2)), **TIGHT)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1 / 9, 3.0])
def test_penalties_are_torchs(beta):
    student, teacher = torch.randn(2, 500, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = F.smooth_l1_loss(student, teacher, beta=beta, reduction="none")
    torch.testing.assert_close(reference.penalty(student - teacher, "smooth_l1", beta), expected, **TIGHT)
    assert torch.equal(reference.penalty(student - teacher, "squared", beta), (student - teacher) ** 2)
    assert torch.equal(reference.penalty(student - teacher, "absolute", beta), (student - teacher).abs())


# --- whole losses, region by region ----------------------------------------------------------------------


def box_iou(first, second):
    """0 of a box without area, where torchvision says 0 / 0."""
    return float(torchvision.ops.box_iou(first[None].double(), second[None].double()).nan_to_num())


def losses_by_loop(
    scene,
    pooled,
    *,
    feature_loss="squared",
    bin_weight="uniform",
    feature_gate="either",
    classification_gate="teacher_better",
    regression_gate="vs_proposal",
    temperature=1.0,
    beta=1 / 9,
    background="first",
    activation="softmax",
    region_weights=None,
    reduction="mean",
):
    """The formulas of the three losses, one region at a time."""
    classes = scene.num_classes
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    losses, gates, scores = [], [], []
    for i, label in enumerate(scene.labels.tolist()):
        foreground = label != (0 if background == "first" else classes)
        box, truth = scene.proposals[i, 1:].double(), scene.gt_boxes[i].double()

        probabilities = []
        for logits in (scene.teacher_logits[i], scene.student_logits[i]):
            if activation == "softmax":
                probabilities.append(float(F.softmax(logits, 0)[label]))
            else:
                probabilities.append(float(logits[label - (background == "first")].sigmoid()) if foreground else 0.0)

        def own(deltas, foreground=foreground, label=label):
            rows = deltas.reshape(-1, 4)
            if len(rows) == 1:
                return rows[0]
            # "first" keeps the background's deltas in row 0, unless there are none.
            return rows[label - (1 if background == "first" and len(rows) == classes else 0)] if foreground else None

        student, teacher = own(scene.student_deltas[i]), own(scene.teacher_deltas[i])
        ious = [0.0, 0.0]
        if foreground:
            decoded = [coder.decode_single(deltas[None], box[None])[0] for deltas in (teacher, student)]
            compared = decoded[1] if regression_gate == "vs_student" else box
            ious = [box_iou(decoded[0], truth), box_iou(compared, truth)]

        classification = {
            "all": True,
            "foreground": foreground,
            "teacher_better": foreground and probabilities[0] > probabilities[1],
        }[classification_gate]
        regression = foreground and (regression_gate == "foreground" or ious[0] > ious[1])
        feature = {
            "all": True,
            "foreground": foreground,
            "classification": classification,
            "regression": regression,
            "either": foreground and (classification or regression),
        }[feature_gate]
        gates.append([feature, classification, regression])
        scores.append([*probabilities, *ious])

        difference = pooled[0][i] - pooled[1][i]
        if feature_loss == "smooth_l1":
            bins = F.smooth_l1_loss(pooled[0][i], pooled[1][i], beta=beta, reduction="none")
        else:
            bins = difference**2 if feature_loss == "squared" else difference.abs()
        if bin_weight == "gaussian":
            height, width = bins.shape[1:]
            for r in range(height):
                for c in range(width):
                    x = box[0] + (c + 0.5) / width * (box[2] - box[0])
                    y = box[1] + (r + 0.5) / height * (box[3] - box[1])
                    inside = foreground and truth[0] <= x <= truth[2] and truth[1] <= y <= truth[3]
                    x0, y0 = (truth[0] + truth[2]) / 2, (truth[1] + truth[3]) / 2
                    w, h = truth[2] - truth[0], truth[3] - truth[1]
                    inside = inside and w > 0 and h > 0
                    exponent = (x - x0) ** 2 / (2 * (w / 2) ** 2) + (y - y0) ** 2 / (2 * (h / 2) ** 2)
                    bins[:, r, c] *= math.exp(-exponent) if inside else 0.0

        z_t, z_s = scene.teacher_logits[i] / temperature, scene.student_logits[i] / temperature
        if activation == "softmax":
            p, q = z_t.softmax(0), z_s.softmax(0)
            kl = (p * (p / q).log()).sum()
        else:
            p, q = z_t.sigmoid(), z_s.sigmoid()
            kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()
        distance = F.smooth_l1_loss(student, teacher, beta=beta, reduction="sum") if foreground else 0.0
        weight = 1.0 if region_weights is None else float(region_weights[i])
        terms = (bins.mean(), temperature**2 * kl, distance)
        losses.append([weight * float(term) * gate for term, gate in zip(terms, gates[-1])])

    losses, gates = torch.tensor(losses, dtype=torch.float64), torch.tensor(gates)
    if reduction != "none":
        losses = losses.sum(0) / (gates.sum(0).clamp(min=1) if reduction == "mean" else 1)
    return losses.unbind(-1), gates, torch.tensor(scores, dtype=torch.float64)


LOOP_OPTIONS = [
    {},
    dict(feature_loss="absolute", bin_weight="gaussian"),
    dict(feature_loss="smooth_l1", beta=0.5, reduction="sum"),
    dict(feature_gate="all", classification_gate="all", regression_gate="foreground", bin_weight="gaussian"),
    dict(feature_gate="foreground", regression_gate="vs_student", reduction="none", region_weights=True),
    dict(feature_gate="classification", classification_gate="foreground", region_weights=True),
    dict(feature_gate="regression", temperature=3.0, region_weights=True, reduction="sum"),
    dict(background="last", student_deltas="agnostic", teacher_deltas="agnostic"),
    dict(background="last", student_deltas="specific", teacher_deltas="specific+background", reduction="none"),
    dict(background="first", student_deltas="specific", teacher_deltas="agnostic", regression_gate="vs_student"),
    dict(activation="sigmoid", student_deltas="specific", teacher_deltas="specific", classification_gate="all"),
    dict(
        activation="sigmoid",
        background="last",
        classification_gate="all",
        feature_gate="all",
        temperature=2.0,
    ),
]


@pytest.mark.parametrize("pooled_form", [False, True], ids=["pyramid", "pooled"])
@pytest.mark.parametrize(
    "options", LOOP_OPTIONS, ids=lambda options: ",".join(map(str, options.values())) or "defaults"
)
def test_losses_are_those_of_a_loop(options, pooled_form):
    options = dict(options)
    scene_options = {
        key: options[key] for key in ("activation", "background", "student_deltas", "teacher_deltas") if key in options
    }
    options = {key: value for key, value in options.items() if not key.endswith("deltas")}
    scene = make_scene(64, geometry="strides", **scene_options)
    if options.get("region_weights"):
        options["region_weights"] = scene.region_weights
    pooled = reference.shared_roi_align(
        scene.student_features, scene.teacher_features, scene.proposals, **scene.scales, **LEVEL_RULE
    )
    expected, gates, scores = losses_by_loop(scene, pooled, **options)
    if pooled_form:
        actual = reference.pooled_distill_loss(*pooled, *scene.per_region, **options)
    else:
        actual = reference.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE, **options)
    assert torch.equal(actual.gates, gates)
    torch.testing.assert_close(actual.scores, scores, rtol=1e-12, atol=1e-12)
    for term, loss, target in zip(TERMS, actual, expected):
        torch.testing.assert_close(loss, target, rtol=1e-11, atol=1e-13, msg=lambda text, term=term: f"{term}: {text}")
        assert target.abs().max() > 0, f"the scene does not exercise the {term} loss"


def test_scenes_exercise_every_gate_both_ways():
    """Else the parity tests would compare zeros."""
    scene = make_scene(65, regions=40)
    for options in ({}, dict(regression_gate="vs_student")):
        losses = reference.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE, **options)
        foreground = scene.labels > 0
        assert (~foreground).any()
        for column, term in enumerate(TERMS):
            open_gates = losses.gates[foreground, column]
            assert open_gates.any() and not open_gates.all(), term


def test_gaussian_loss_is_that_of_a_loop():
    """Pixel by pixel, with overlapping boxes and a level whose mask sums to less than one."""
    generator = torch.Generator().manual_seed(5)
    shapes, scales = [(2, 3, 9, 12), (2, 3, 4, 5), (2, 3, 1, 1)], [0.5, 0.23, 0.01]
    student, teacher = (
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(2)
    )
    gt_boxes = [
        torch.tensor([[1.0, 2.0, 15.0, 11.0], [7.0, 0.5, 22.0, 16.0], [3.0, 3.0, 3.0, 9.0]]),
        torch.tensor([[-5.0, -3.0, 9.0, 40.0]]),
    ]
    sigma_squared, levels = 1.5, []
    for level, scale in enumerate(scales):
        total, area = 0.0, 0.0
        for n, boxes in enumerate(gt_boxes):
            for y in range(shapes[level][2]):
                for x in range(shapes[level][3]):
                    masks = [0.0]
                    for x1, y1, x2, y2 in (boxes.double() * scale).tolist():
                        if x2 > x1 and y2 > y1 and x1 <= x <= x2 and y1 <= y <= y2:
                            u = (x - (x1 + x2) / 2) / ((x2 - x1) / 2)
                            v = (y - (y1 + y2) / 2) / ((y2 - y1) / 2)
                            masks.append(math.exp(-(u * u + v * v) / sigma_squared))
                    distance = (student[level][n, :, y, x] - teacher[level][n, :, y, x]).square().sum()
                    total, area = total + max(masks) * float(distance), area + max(masks)
        levels.append(total / (2 * max(1.0, area)))
    assert 0 < area < 1
    actual = reference.gaussian_feature_loss(student, teacher, gt_boxes, scales=scales, sigma_squared=sigma_squared)
    assert actual.item() == pytest.approx(sum(levels) / 3, rel=1e-13)


# --- by hand ---------------------------------------------------------------------------------------------


def test_three_regions_by_hand():
    """One foreground region that opens every gate, one that opens none, one of background."""
    zeros, log = torch.zeros, math.log
    student_logits = torch.tensor([[log(3.0), 0.0], [0.0, log(3.0)], [0.0, 0.0]], dtype=torch.float64)
    teacher_logits = torch.tensor([[0.0, log(3.0)], [log(3.0), 0.0], [0.0, 5.0]], dtype=torch.float64)
    proposals = torch.tensor([[0, 0.0, 0.0, 8.0, 8.0], [0, 0.0, 0.0, 8.0, 8.0], [0, 0.0, 0.0, 8.0, 8.0]])
    gt_boxes = torch.tensor([[4.0, 0.0, 12.0, 8.0], [0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 0.0, 0.0]])
    student_deltas = zeros(3, 4, dtype=torch.float64)
    teacher_deltas = zeros(3, 4, dtype=torch.float64)
    teacher_deltas[0, 0] = 5.0  # dx = 0.5 box widths: onto the ground truth
    student = torch.full((1, 1, 8, 8), 2.0, dtype=torch.float64)
    teacher = torch.full((1, 1, 4, 4), 5.0, dtype=torch.float64)
    losses = reference.region_distill_loss(
        [student],
        [teacher],
        proposals,
        student_logits,
        teacher_logits,
        student_deltas,
        teacher_deltas,
        torch.tensor([1, 1, 0]),
        gt_boxes,
        student_scales=[1.0],
        teacher_scales=[0.5],
        region_weights=torch.tensor([2.0, 100.0, 100.0]),
    )
    assert losses.gates.tolist() == [[True, True, True], [False, False, False], [False, False, False]]
    expected = [[0.75, 0.25, 1.0, 1 / 3], [0.25, 0.75, 1.0, 1.0], [1 / (1 + math.exp(5)), 0.5, 0.0, 0.0]]
    torch.testing.assert_close(losses.scores, torch.tensor(expected, dtype=torch.float64), **TIGHT)
    assert losses.feature.item() == 2 * 3.0**2
    assert losses.classification.item() == pytest.approx(2 * (0.75 * log(3) - 0.25 * log(3)), rel=1e-14)
    assert losses.regression.item() == pytest.approx(2 * (5.0 - 0.5 / 9), rel=1e-14)


def test_bin_weights_by_hand():
    """Bin centres at 1, 3, 5, 7 across and 2, 6 down; one gt box ends exactly on some of them."""
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0]]).repeat(2, 1)
    gt_boxes = torch.tensor([[1.0, 2.0, 5.0, 10.0], [4.0, 2.5, 4.0, 8.0]])
    weights = reference.gaussian_bin_weights(boxes, gt_boxes, (2, 4))
    edge = math.exp(-0.5)  # one half extent off the centre, sigma squared 2
    expected = [[edge * edge, edge, edge * edge, 0.0], [edge, 1.0, edge, 0.0]]
    torch.testing.assert_close(weights[0], torch.tensor(expected, dtype=torch.float64), **TIGHT)
    assert not weights[1].any()


def test_half_precision_is_read_and_then_accumulated_in_float32():
    """Differences below the resolution of float16 survive, since nothing between is rounded to it."""
    scene = make_scene(66).to(torch.float16)
    losses = reference.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE)
    wide = scene.to(torch.float32)
    expected = reference.region_distill_loss(*wide.inputs, **wide.scales, **LEVEL_RULE)
    for got, want in zip(losses, expected):
        assert torch.equal(got, want)
