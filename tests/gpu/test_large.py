"""Inputs of the size that training has, against the reference in float64 on the same device, and larger ones yet."""

from __future__ import annotations

import pytest
import torch
import workloads
from ops.parity import UPSTREAM, assert_losses_match
from ops.scenes import Scene
from ops.test_gaussian import assert_gaussian_matches
from ops.test_region_loss import DTYPES
from ops.test_roi_align import assert_roi_align_matches
from tolerances import assert_tensors_close, assert_values_close

import tardkd.ops
from tardkd.ops import reference

pytestmark = pytest.mark.gpu


# --- 1024 regions of two images of 800 x 1344 pixels, 256 channels ----------------------------------------------------


@pytest.fixture(scope="module")
def coco() -> tuple[Scene, list[torch.Tensor]]:
    """In float32 on the CPU, with the ground truth of each image."""
    work = workloads.coco()
    index = torch.cat([torch.full((len(boxes), 1), float(image)) for image, boxes in enumerate(work.boxes)])
    scene = Scene(
        student_features=[feature.detach() for feature in work.student_features],
        teacher_features=work.teacher_features,
        proposals=torch.cat([index, torch.cat(work.boxes)], dim=1),
        student_logits=work.student_logits.detach(),
        teacher_logits=work.teacher_logits,
        student_deltas=work.student_deltas.detach(),
        teacher_deltas=work.teacher_deltas,
        labels=work.labels,
        gt_boxes=work.gt_boxes,
        region_weights=torch.ones(len(work.labels)),
        student_scales=list(workloads.SCALES),
        teacher_scales=list(workloads.SCALES),
        num_classes=work.student_logits.shape[1] - 1,
    )
    return scene, work.gt_per_image


def reference_by_chunks(scene: Scene, chunk: int, **options):
    """(losses, gates, gradients) of the means, from the sums over few regions at a time, which fit into memory."""
    losses, gates, gradients = 0, [], [torch.zeros_like(leaf) for leaf in scene.leaves]
    for rows in torch.arange(len(scene.labels), device=scene.labels.device).split(chunk):
        part = scene.rows(rows)
        sums = reference.region_distill_loss(*part.inputs, **part.scales, reduction="sum", **options)
        # Each of the leaves hears of one loss only, so the sum of the three keeps them apart.
        for total, gradient in zip(gradients, torch.autograd.grad(sum(sums[:3]), scene.leaves)):
            total += gradient
        losses = losses + torch.stack(sums[:3]).detach()
        gates.append(sums.gates)
    gates = torch.cat(gates)
    counts = gates.sum(0).clamp(min=1)
    terms = [0] * len(scene.student_features) + [1, 2]
    return losses / counts, gates, [g * (UPSTREAM[term] / counts[term]) for g, term in zip(gradients, terms)]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float32-float16"])
@pytest.mark.parametrize("gate", ["either", "all"])
@pytest.mark.parametrize("levels", [4, 3], ids=["equal", "fewer levels"])
def test_region_loss(coco, levels, gate, dtypes, layout):
    scene = coco[0].to(*DTYPES[dtypes], layout, layout, device="cuda")
    scene.teacher_features, scene.teacher_scales = scene.teacher_features[-levels:], scene.teacher_scales[-levels:]
    losses = tardkd.ops.region_distill_loss(*scene.inputs, **scene.scales, feature_gate=gate)
    total = sum(weight * loss for weight, loss in zip(UPSTREAM, losses[:3]))
    gradients = torch.autograd.grad(total, scene.leaves)

    wide = scene.to(torch.float64, device="cuda")
    expected, gates, targets = reference_by_chunks(wide, 128, feature_gate=gate)
    assert torch.equal(losses.gates, gates)
    dtype = DTYPES[dtypes][0]
    assert_values_close(torch.stack(losses[:3]), expected, dtype, "losses")
    for index, (gradient, target) in enumerate(zip(gradients, targets)):
        assert_tensors_close(gradient, target, dtype, f"gradients[{index}]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_roi_align(coco, layout, dtype):
    scene = coco[0].to(dtype, None, layout, device="cuda")
    options = dict(scales=scene.student_scales)
    assert_roi_align_matches(tardkd.ops, scene.student_features, scene.proposals[:512], **options)
    assert_roi_align_matches(tardkd.ops, scene.student_features, scene.proposals[512:768], output_size=14, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_gaussian(coco, layout, dtype):
    scene = coco[0].to(dtype, None, layout, layout, device="cuda")
    assert_gaussian_matches(tardkd.ops, scene, [boxes.to("cuda") for boxes in coco[1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pooled_loss(coco, dtype):
    scene = coco[0].to(dtype, device="cuda")
    pooled = [torch.randn((len(scene.labels), 256, 7, 7), device="cuda").to(dtype) for _ in range(2)]
    pooled[0].requires_grad_()
    assert_losses_match(tardkd.ops, scene, pooled=tuple(pooled), feature_gate="all", bin_weight="gaussian")


# --- more than 2^31 elements: the op on the part that matters, cut out, gives the expected values --------------------

LIMIT = 2**31
DTYPE = torch.bfloat16
SOME = slice(None, None, 32)  # channels, of maps that would take long to compare whole


def needs_memory(gigabytes: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GiB of free device memory, there are {free >> 30}")


def huge(shape: tuple[int, ...], layout: str) -> torch.Tensor:
    """NaN everywhere: whatever is read where it should not be, shows."""
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    feature = torch.empty(shape, dtype=DTYPE, device="cuda", memory_format=memory_format).fill_(float("nan"))
    assert feature.numel() > LIMIT
    return feature


def boxes_between(low: float, high: float, count: int) -> torch.Tensor:
    """(count, 4), of 32 to 256 pixels a side, with whole numbers for corners."""
    generator = torch.Generator().manual_seed(0)
    corner = low + torch.rand((count, 2), generator=generator) * (high - low - 256)
    size = 32 + torch.rand((count, 2), generator=generator) * 224
    return torch.cat([corner, corner + size], 1).round().to("cuda")


def heads(regions: int) -> list[torch.Tensor]:
    """Logits of two classes and class-agnostic deltas of both sides; the student's require grad."""
    generator = torch.Generator().manual_seed(1)
    student_logits, teacher_logits, student_deltas, teacher_deltas = (
        torch.randn((regions, columns), generator=generator).to("cuda", DTYPE) for columns in (2, 2, 4, 4)
    )
    return [student_logits.requires_grad_(), teacher_logits, student_deltas.requires_grad_(), teacher_deltas]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_images_beyond(layout):
    """The losses of pyramids, on the last of nine images of 2^28 elements each."""
    needs_memory(36)
    sides = [huge((9, 256, 1024, 1024), layout) for _ in range(2)]
    for side in sides:
        side[-1].normal_()
    boxes = boxes_between(0, 4096, 64)
    index = torch.full((64, 1), 8.0, device="cuda")
    labels = torch.ones(64, dtype=torch.int64, device="cuda")

    def losses(student, teacher, image):
        student = student.detach().requires_grad_()
        regions = torch.cat([image, boxes], 1)
        options = dict(student_scales=[0.25], feature_gate="all")
        per_region = (regions, *heads(64), labels, boxes)
        loss = tardkd.ops.region_distill_loss([student], [teacher], *per_region, **options).feature
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    def dense(student, teacher, images):
        student = student.detach().requires_grad_()
        gt_boxes = [boxes[:0]] * (images - 1) + [boxes]
        loss = tardkd.ops.gaussian_feature_loss([student], [teacher], gt_boxes, scales=[0.25])
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    last = [side[-1:].clone(memory_format=torch.preserve_format) for side in sides]
    for actual, expected in (
        (losses(*sides, index), losses(*last, index * 0)),
        (dense(*sides, 9), dense(*last, 1)),
    ):
        assert_values_close(actual[0], expected[0], torch.float32)
        assert_tensors_close(actual[1][-1:, SOME], expected[1][:, SOME], DTYPE)
        assert not actual[1][:-1].any()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_elements_of_one_image_beyond(layout):
    """RoIAlign at the lower end of a map: in its last channels beyond the limit, or in all of them."""
    needs_memory(28)
    feature = huge((1, 2304, 1024, 1024), layout)
    feature[:, :, 896:].normal_()
    boxes = boxes_between(0, 512, 16)
    shift = boxes.new_tensor([0.0, 3584.0, 0.0, 3584.0])

    def pool(feature, boxes):
        feature = feature.detach().requires_grad_()
        regions = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)
        pooled = tardkd.ops.multiscale_roi_align([feature], regions, scales=[0.25])
        return pooled.detach(), torch.autograd.grad(pooled, feature, torch.ones_like(pooled))[0]

    pooled, gradient = pool(feature, boxes + shift)
    expected, target = pool(feature[:, :, 896:].clone(memory_format=torch.preserve_format), boxes)
    assert_tensors_close(pooled, expected, DTYPE)
    assert_tensors_close(gradient[:, SOME, 896:], target[:, SOME], DTYPE)
    assert not gradient[:, :, :896].any()


REGIONS = 171_300  # of 256 channels and 7 x 7 bins


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_pooled_elements_beyond(layout):
    """Only the last hundred regions are foreground; the features of the others are NaN and closed."""
    needs_memory(28)
    sides = [huge((REGIONS, 256, 7, 7), layout) for _ in range(2)]
    for side in sides:
        side[-100:].normal_()
    boxes = boxes_between(0, 1024, REGIONS)
    labels = (torch.arange(REGIONS, device="cuda") >= REGIONS - 100).long()
    per_region = [torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1), *heads(REGIONS), labels, boxes]

    def losses(rows):
        student = sides[0][rows].detach().requires_grad_()
        regions = [tensor[rows] for tensor in per_region]
        loss = tardkd.ops.pooled_distill_loss(student, sides[1][rows], *regions, feature_gate="foreground").feature
        return loss.detach(), torch.autograd.grad(loss, student)[0]

    loss, gradient = losses(slice(None))
    expected, target = losses(slice(-100, None))
    assert_values_close(loss, expected, torch.float32)
    assert_tensors_close(gradient[-100:], target, DTYPE)
    assert not gradient[:-100].any()


def test_pooled_results_beyond():
    needs_memory(28)
    feature = torch.randn((1, 256, 128, 128), device="cuda").to(DTYPE).requires_grad_()
    boxes = boxes_between(0, 512, REGIONS)
    regions = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)
    pooled = tardkd.ops.multiscale_roi_align([feature], regions, scales=[0.25])
    assert pooled.numel() > LIMIT
    expected = tardkd.ops.multiscale_roi_align([feature], regions[-100:], scales=[0.25])
    assert torch.equal(pooled[-100:], expected)
    upstream = torch.zeros_like(pooled)
    upstream[-100:].normal_()
    (gradient,) = torch.autograd.grad(pooled, feature, upstream)
    (target,) = torch.autograd.grad(expected, feature, upstream[-100:])
    assert_tensors_close(gradient, target, DTYPE)
