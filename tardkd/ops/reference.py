"""The ops in plain PyTorch: what the native kernels are held against.

Written from the definitions and not for speed. RoIAlign is its per-sample bilinear form, geometry is float64,
features are read in the accumulation dtype, and autograd supplies the gradients. Regions that a gate closes
are never pooled, so nothing of them, NaN included, reaches a loss or a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .types import RegionLosses as RegionLosses

LEVEL_EPSILON = 1e-6  # torchvision's, added before the floor
MAX_SIZE_DELTA = math.log(1000.0 / 16)  # torchvision's clamp of dw and dh


# --- RoIAlign -------------------------------------------------------------------------------------


def valid_regions(regions: Tensor, num_images: int | None) -> Tensor:
    """(R,) bool: finite box and, where the number of images is known, an image index in range."""
    valid = regions[:, 1:].isfinite().all(1)
    if num_images is not None:
        image = regions[:, 0].floor()
        valid = valid & (image >= 0) & (image < num_images)
    return valid


def region_levels(boxes: Tensor, scales: Sequence[float], canonical_scale: float, canonical_level: int) -> Tensor:
    """Level index of each (R, 4) box: eq. 1 of FPN (Lin et al. 2017), clamped to their octaves."""
    boxes = boxes.double()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    size = area.clamp(min=0).sqrt()  # a box without area goes to the finest level: log2(0) = -inf
    level = torch.floor(canonical_level + torch.log2(size / canonical_scale) + LEVEL_EPSILON + math.log2(scales[0]))
    # Of several maps of one stride torchvision reaches only the first.
    octaves = max(0, math.floor(math.log2(scales[0] / scales[-1]) + 0.5))
    return level.clamp(0, min(octaves, len(scales) - 1)).long()


def sample_axis(
    start: Tensor, extent: Tensor, bins: int, grid: int, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The samples of every bin along one axis: pixel below, pixel above, weight of the latter, inside or not.

    start, extent: (r,) region in map pixels; returns (r, bins * grid) each.
    """
    step = (extent / bins)[:, None, None]
    bin_index = torch.arange(bins, dtype=torch.float64, device=start.device)[None, :, None]
    sample = torch.arange(grid, dtype=torch.float64, device=start.device)[None, None, :]
    position = (start[:, None, None] + bin_index * step + (sample + 0.5) * step / grid).flatten(1)
    inside = (position >= -1) & (position <= size)
    position = position.clamp(0, size - 1)
    below = position.floor()
    above = (below + 1).clamp(max=size - 1)
    return below.long(), above.long(), position - below, inside


def roi_align_level(
    feature: Tensor,  # (N, C, H, W)
    regions: Tensor,  # (r, 5) float64, all valid
    scale: float,
    output_size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:  # (r, C, h, w)
    """Torchvision's ``roi_align`` on one map."""
    bins_y, bins_x = output_size
    image = regions[:, 0].floor().long()
    corners = regions[:, 1:] * scale - (0.5 if aligned else 0.0)
    start_x, start_y = corners[:, 0], corners[:, 1]
    extent_x, extent_y = corners[:, 2] - start_x, corners[:, 3] - start_y
    if not aligned:
        extent_x, extent_y = extent_x.clamp(min=1), extent_y.clamp(min=1)

    if sampling_ratio > 0:
        grids = torch.full((len(regions), 2), sampling_ratio, device=regions.device)
    else:
        grids = torch.stack([(extent_y / bins_y).ceil(), (extent_x / bins_x).ceil()], 1).clamp(min=0).long()

    pooled = feature.new_zeros(len(regions), feature.shape[1], bins_y, bins_x)
    pixels = feature.permute(0, 2, 3, 1)
    for grid_y, grid_x in grids.unique(dim=0).tolist() if len(regions) else [(1, 1)]:
        rows = (grids == grids.new_tensor([grid_y, grid_x])).all(1).nonzero()[:, 0]
        low_y, high_y, part_y, in_y = sample_axis(start_y[rows], extent_y[rows], bins_y, grid_y, feature.shape[2])
        low_x, high_x, part_x, in_x = sample_axis(start_x[rows], extent_x[rows], bins_x, grid_x, feature.shape[3])

        def tap(y: Tensor, x: Tensor, weight_y: Tensor, weight_x: Tensor) -> Tensor:
            weight = (weight_y[:, :, None] * weight_x[:, None, :]).to(feature.dtype)
            return weight[..., None] * pixels[image[rows][:, None, None], y[:, :, None], x[:, None, :]]

        samples = (
            tap(low_y, low_x, 1 - part_y, 1 - part_x)
            + tap(low_y, high_x, 1 - part_y, part_x)
            + tap(high_y, low_x, part_y, 1 - part_x)
            + tap(high_y, high_x, part_y, part_x)
        )  # (r, bins_y * grid_y, bins_x * grid_x, C)
        inside = (in_y[:, :, None] & in_x[:, None, :])[..., None]
        samples = torch.where(inside, samples, samples.new_zeros(()))
        samples = samples.reshape(len(rows), bins_y, grid_y, bins_x, grid_x, feature.shape[1])
        mean = samples.sum((2, 4)) / max(grid_y * grid_x, 1)
        pooled = pooled.index_add(0, rows, mean.permute(0, 3, 1, 2))
    return pooled


def pool_regions(
    features: Sequence[Tensor],  # L x (N, C, H_l, W_l)
    regions: Tensor,  # (r, 5), all valid
    *,
    scales: Sequence[float],
    output_size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
    canonical_scale: float,
    canonical_level: int,
) -> Tensor:  # (r, C, h, w), accumulation dtype
    """Each region from its level. Every level joins the graph, also one that holds no region."""
    regions = regions.double()
    levels = region_levels(regions[:, 1:], scales, canonical_scale, canonical_level)
    dtype = checks.accumulation_dtype(features[0].dtype)
    pooled = features[0].new_zeros((len(regions), features[0].shape[1], *output_size), dtype=dtype)
    for level, (feature, scale) in enumerate(zip(features, scales)):
        rows = (levels == level).nonzero()[:, 0]
        part = roi_align_level(feature.to(dtype), regions[rows], scale, output_size, sampling_ratio, aligned)
        pooled = pooled.index_add(0, rows, part)
    return pooled


def multiscale_roi_align(
    features: Sequence[Tensor],
    proposals: Tensor | Sequence[Tensor],
    *,
    scales: Sequence[float],
    output_size: int | Sequence[int] = 7,
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_scale: float = 224,
    canonical_level: int = 4,
) -> Tensor:
    """Pool every proposal from the level its size asks for; returns (R, C, h, w) in the features' dtype.

    Arguments as in :func:`tardkd.ops.multiscale_roi_align`. Invalid regions give zeros.
    """
    output_size = checks.output_pair(output_size)
    checks.check_level_rule(canonical_scale, canonical_level)
    checks.check_pyramid("features", features)
    checks.check_scales("scales", scales, "features", features)
    num_images = features[0].shape[0]
    regions = checks.as_regions(proposals, num_images, features[0].device)
    if checks.checking_values():
        checks.check_region_values(regions, num_images)

    valid = valid_regions(regions, num_images).nonzero()[:, 0]
    pooled = pool_regions(
        features,
        regions[valid],
        scales=scales,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
        canonical_scale=canonical_scale,
        canonical_level=canonical_level,
    )
    return pooled.new_zeros(len(regions), *pooled.shape[1:]).index_add(0, valid, pooled).to(features[0].dtype)


def shared_roi_align(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    proposals: Tensor | Sequence[Tensor],
    *,
    student_scales: Sequence[float],
    teacher_scales: Sequence[float] | None = None,
    output_size: int | Sequence[int] = 7,
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_scale: float = 224,
    canonical_level: int = 4,
) -> tuple[Tensor, Tensor]:
    """Pool the same proposals from both pyramids, each by its own scales and level rule."""
    teacher_scales = checks.check_pyramids(student_features, teacher_features, student_scales, teacher_scales)
    options = dict(
        output_size=output_size,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
        canonical_scale=canonical_scale,
        canonical_level=canonical_level,
    )
    student_pooled = multiscale_roi_align(student_features, proposals, scales=student_scales, **options)
    teacher_pooled = multiscale_roi_align(teacher_features, proposals, scales=teacher_scales, **options)
    return student_pooled, teacher_pooled


# --- boxes and classes ----------------------------------------------------------------------------


def decode(deltas: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """(R, 4) deltas applied to (R, 4) boxes: Faster R-CNN's coding, as torchvision's ``BoxCoder``."""
    deltas, boxes = deltas.double(), boxes.double()
    size = boxes[:, 2:] - boxes[:, :2]
    centre = boxes[:, :2] + 0.5 * size
    shift = deltas[:, :2] / deltas.new_tensor(weights[:2])
    growth = (deltas[:, 2:] / deltas.new_tensor(weights[2:])).clamp(max=MAX_SIZE_DELTA)
    centre, size = centre + shift * size, growth.exp() * size
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=1)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of each row of (R, 4) with the same row of (R, 4); 0 without a union; NaN stays NaN."""
    first, second = first.double(), second.double()
    overlap = (torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])).clamp(min=0)
    intersection = overlap.prod(1)
    union = (first[:, 2:] - first[:, :2]).prod(1) + (second[:, 2:] - second[:, :2]).prod(1) - intersection
    return torch.where(union <= 0, torch.zeros_like(union), intersection / union)


def select_deltas(deltas: Tensor, labels: Tensor, num_classes: int, background: str) -> Tensor:
    """The (r, 4) deltas of each foreground region's own class."""
    if deltas.shape[1] == 4:
        return deltas
    has_background = deltas.shape[1] == 4 * (num_classes + 1)
    column = labels - 1 if background == "first" and not has_background else labels
    return deltas.reshape(len(deltas), deltas.shape[1] // 4, 4)[torch.arange(len(deltas), device=deltas.device), column]


def class_scores(logits: Tensor, labels: Tensor, foreground: Tensor, activation: str, background: str) -> Tensor:
    """(r,) p(y) at temperature 1. A sigmoid head has no column for the background: 0 there."""
    rows = torch.arange(len(logits), device=logits.device)
    if activation == "softmax":
        return logits.softmax(1)[rows, labels]
    column = labels - 1 if background == "first" else labels
    score = logits.sigmoid()[rows, torch.where(foreground, column, torch.zeros_like(column))]
    return torch.where(foreground, score, torch.zeros_like(score))


# --- gates ----------------------------------------------------------------------------------------


@torch.no_grad()
def gates_and_scores(
    regions: Tensor,  # (R, 5)
    student_logits: Tensor,  # (R, K+1) or (R, K), accumulation dtype, as the other heads' outputs
    teacher_logits: Tensor,
    student_deltas: Tensor,
    teacher_deltas: Tensor,
    labels: Tensor,  # (R,)
    gt_boxes: Tensor,  # (R, 4)
    *,
    num_images: int | None,
    num_classes: int,
    feature_gate: str,
    classification_gate: str,
    regression_gate: str,
    box_weights: Sequence[float],
    background: str,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates (R, 3) bool, scores (R, 4) and foreground (R,) bool; invalid regions are closed and score 0."""
    not_background = labels != (0 if background == "first" else num_classes)
    valid = valid_regions(regions, num_images) & (labels >= 0) & (labels <= num_classes)
    valid = valid & (~not_background | gt_boxes.isfinite().all(1))
    foreground = valid & not_background

    scores = student_logits.new_zeros(len(regions), 4)
    rows = valid.nonzero()[:, 0]
    for column, logits in enumerate((teacher_logits, student_logits)):
        scores[rows, column] = class_scores(logits[rows], labels[rows], foreground[rows], activation, background)

    # IoUs are compared in float64, before the scores round them.
    rows = foreground.nonzero()[:, 0]
    boxes, truth, classes = regions[rows, 1:], gt_boxes[rows], labels[rows]

    def iou_of_decoded(deltas: Tensor) -> Tensor:
        own = select_deltas(deltas[rows], classes, num_classes, background)
        return pairwise_iou(decode(own, boxes, box_weights), truth)

    teacher_iou = iou_of_decoded(teacher_deltas)
    other_iou = iou_of_decoded(student_deltas) if regression_gate == "vs_student" else pairwise_iou(boxes, truth)
    scores[rows, 2] = teacher_iou.to(scores.dtype)
    scores[rows, 3] = other_iou.to(scores.dtype)

    classification = {
        "all": valid,
        "foreground": foreground,
        "teacher_better": foreground & (scores[:, 0] > scores[:, 1]),
    }[classification_gate]
    regression = foreground.clone()
    if regression_gate != "foreground":
        regression[rows] = teacher_iou > other_iou
    feature = {
        "all": valid,
        "foreground": foreground,
        "classification": classification,
        "regression": regression,
        "either": foreground & (classification | regression),
    }[feature_gate]
    return torch.stack([feature, classification, regression], 1), scores, foreground


# --- losses of the open regions -------------------------------------------------------------------


def penalty(difference: Tensor, kind: str, beta: float) -> Tensor:
    """rho, elementwise."""
    magnitude = difference.abs()
    if kind == "squared":
        return difference * difference
    if kind == "absolute" or beta == 0:
        return magnitude
    return torch.where(magnitude < beta, 0.5 * difference * difference / beta, magnitude - 0.5 * beta)


@torch.no_grad()
def gaussian_bin_weights(boxes: Tensor, gt_boxes: Tensor, output_size: tuple[int, int]) -> Tensor:
    """(r, h, w) float64: the Gaussian of each gt box at the bin centres of its region, 0 outside the gt box.

    sigma squared is 2, as in :func:`gaussian_feature_loss`.
    """
    boxes, gt_boxes = boxes.double(), gt_boxes.double()
    exponent, inside = [], []
    for low, bins in ((1, output_size[0]), (0, output_size[1])):
        start, end = boxes[:, low, None], boxes[:, low + 2, None]
        centre = start + (torch.arange(bins, device=boxes.device) + 0.5) * (end - start) / bins
        exponent.append(gaussian_exponent(centre, gt_boxes[:, low, None], gt_boxes[:, low + 2, None], 2.0))
        inside.append((centre >= gt_boxes[:, low, None]) & (centre <= gt_boxes[:, low + 2, None]))
    has_area = (gt_boxes[:, 2:] > gt_boxes[:, :2]).all(1)[:, None, None]
    inside_both = inside[0][:, :, None] & inside[1][:, None, :] & has_area
    weight = torch.exp(exponent[0][:, :, None] + exponent[1][:, None, :])
    return torch.where(inside_both, weight, torch.zeros_like(weight))


def gaussian_exponent(position: Tensor, low: Tensor, high: Tensor, sigma_squared: float) -> Tensor:
    """-(x - x0)^2 / (sigma^2 (w/2)^2) along one axis."""
    half = (high - low) / 2
    return -((position - (low + high) / 2) ** 2) / (sigma_squared * half * half)


def divergence(teacher_logits: Tensor, student_logits: Tensor, temperature: float, activation: str) -> Tensor:
    """(r,) T^2 KL(teacher || student) at temperature T; for sigmoid heads the sum of the K binary ones."""
    teacher, student = teacher_logits / temperature, student_logits / temperature
    if activation == "softmax":
        teacher_log, student_log = F.log_softmax(teacher, 1), F.log_softmax(student, 1)
        # A class without mass adds nothing (0 log 0 = 0), also where both logits are -inf.
        has_mass = teacher_log.exp() > 0
        terms = torch.where(has_mass, teacher_log.exp() * (teacher_log - student_log), teacher_log.new_zeros(()))
    else:
        terms = sum(
            F.logsigmoid(sign * teacher).exp() * (F.logsigmoid(sign * teacher) - F.logsigmoid(sign * student))
            for sign in (1, -1)
        )
    return temperature**2 * terms.sum(1)


def reduce_regions(losses: Tensor, rows: Tensor, weights: Tensor, num_regions: int, reduction: str) -> Tensor:
    """losses: (r,) of the open regions ``rows``; weights: (R,)."""
    losses = losses * weights[rows]
    if reduction == "none":
        return losses.new_zeros(num_regions).index_add(0, rows, losses)
    return losses.sum() / (max(1, len(rows)) if reduction == "mean" else 1)


def _losses(
    pooled_pair,  # rows -> (student, teacher), each (r, C, h, w) in the accumulation dtype
    regions: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_deltas: Tensor,
    teacher_deltas: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
    region_weights: Tensor | None,
    *,
    dtype: torch.dtype,
    num_images: int | None,
    num_classes: int,
    feature_loss: str,
    bin_weight: str,
    feature_gate: str,
    classification_gate: str,
    regression_gate: str,
    temperature: float,
    beta: float,
    box_weights: Sequence[float],
    background: str,
    activation: str,
    reduction: str,
) -> RegionLosses:
    heads = [x.to(dtype) for x in (student_logits, teacher_logits, student_deltas, teacher_deltas)]
    student_logits, teacher_logits, student_deltas, teacher_deltas = heads
    weights = student_logits.new_ones(len(regions)) if region_weights is None else region_weights.to(dtype)
    gates, scores, foreground = gates_and_scores(
        regions,
        *heads,
        labels,
        gt_boxes,
        num_images=num_images,
        num_classes=num_classes,
        feature_gate=feature_gate,
        classification_gate=classification_gate,
        regression_gate=regression_gate,
        box_weights=box_weights,
        background=background,
        activation=activation,
    )

    rows = gates[:, 0].nonzero()[:, 0]
    student_pooled, teacher_pooled = pooled_pair(rows)
    bins = penalty(student_pooled - teacher_pooled, feature_loss, beta)
    if bin_weight == "gaussian":
        weight = gaussian_bin_weights(regions[rows, 1:], gt_boxes[rows], tuple(bins.shape[2:]))
        weight = torch.where(foreground[rows, None, None], weight, torch.zeros_like(weight))
        bins = bins * weight[:, None].to(dtype)
    feature = reduce_regions(bins.mean((1, 2, 3)), rows, weights, len(regions), reduction)

    rows = gates[:, 1].nonzero()[:, 0]
    divergences = divergence(teacher_logits[rows], student_logits[rows], temperature, activation)
    classification = reduce_regions(divergences, rows, weights, len(regions), reduction)

    rows = gates[:, 2].nonzero()[:, 0]
    student, teacher = (
        select_deltas(deltas[rows], labels[rows], num_classes, background)
        for deltas in (student_deltas, teacher_deltas)
    )
    distances = penalty(student - teacher, "smooth_l1", beta).sum(1)
    regression = reduce_regions(distances, rows, weights, len(regions), reduction)
    return RegionLosses(feature, classification, regression, gates, scores)


# --- the losses -----------------------------------------------------------------------------------


def region_distill_loss(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    proposals: Tensor | Sequence[Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_deltas: Tensor,
    teacher_deltas: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
    *,
    student_scales: Sequence[float],
    teacher_scales: Sequence[float] | None = None,
    output_size: int | Sequence[int] = 7,
    sampling_ratio: int = 2,
    aligned: bool = False,
    canonical_scale: float = 224,
    canonical_level: int = 4,
    feature_loss: str = "squared",
    bin_weight: str = "uniform",
    feature_gate: str = "either",
    classification_gate: str = "teacher_better",
    regression_gate: str = "vs_proposal",
    temperature: float = 1.0,
    beta: float = 1 / 9,
    box_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
    background: str = "first",
    activation: str = "softmax",
    region_weights: Tensor | None = None,
    reduction: str = "mean",
) -> RegionLosses:
    """Gates and the three losses of shared regions, from the two pyramids.

    Arguments, results and errors as in :func:`tardkd.ops.region_distill_loss`.
    """
    options = dict(
        feature_loss=feature_loss,
        bin_weight=bin_weight,
        feature_gate=feature_gate,
        classification_gate=classification_gate,
        regression_gate=regression_gate,
        background=background,
        activation=activation,
        reduction=reduction,
    )
    numbers = dict(temperature=temperature, beta=beta, box_weights=box_weights)
    checks.check_level_rule(canonical_scale, canonical_level)
    output_size = checks.output_pair(output_size)
    teacher_scales = checks.check_pyramids(student_features, teacher_features, student_scales, teacher_scales)
    like, num_images = student_features[0], student_features[0].shape[0]
    per_region = (student_logits, teacher_logits, student_deltas, teacher_deltas, labels, gt_boxes, region_weights)
    regions = checks.check_region_loss(like, num_images, proposals, per_region, options, numbers)

    def pooled_pair(rows: Tensor) -> list[Tensor]:
        return [
            pool_regions(
                features,
                regions[rows],
                scales=scales,
                output_size=output_size,
                sampling_ratio=sampling_ratio,
                aligned=aligned,
                canonical_scale=canonical_scale,
                canonical_level=canonical_level,
            )
            for features, scales in ((student_features, student_scales), (teacher_features, teacher_scales))
        ]

    return _losses(
        pooled_pair,
        regions,
        *per_region,
        dtype=checks.accumulation_dtype(like.dtype),
        num_images=num_images,
        num_classes=checks.class_count(student_logits.shape[1], activation),
        **numbers,
        **options,
    )


def pooled_distill_loss(
    student_pooled: Tensor,
    teacher_pooled: Tensor,
    proposals: Tensor | Sequence[Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_deltas: Tensor,
    teacher_deltas: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
    *,
    feature_loss: str = "squared",
    bin_weight: str = "uniform",
    feature_gate: str = "either",
    classification_gate: str = "teacher_better",
    regression_gate: str = "vs_proposal",
    temperature: float = 1.0,
    beta: float = 1 / 9,
    box_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
    background: str = "first",
    activation: str = "softmax",
    region_weights: Tensor | None = None,
    reduction: str = "mean",
) -> RegionLosses:
    """:func:`region_distill_loss` from (R, C, h, w) regions that are pooled already.

    The proposals serve the gates and the bin weights only, so the image index is not looked at.
    """
    options = dict(
        feature_loss=feature_loss,
        bin_weight=bin_weight,
        feature_gate=feature_gate,
        classification_gate=classification_gate,
        regression_gate=regression_gate,
        background=background,
        activation=activation,
        reduction=reduction,
    )
    numbers = dict(temperature=temperature, beta=beta, box_weights=box_weights)
    checks.check_pooled(student_pooled, teacher_pooled)
    per_region = (student_logits, teacher_logits, student_deltas, teacher_deltas, labels, gt_boxes, region_weights)
    regions = checks.check_region_loss(student_pooled, None, proposals, per_region, options, numbers)
    checks.check_rows("student_pooled", student_pooled, regions)
    dtype = checks.accumulation_dtype(student_pooled.dtype)
    return _losses(
        lambda rows: (student_pooled[rows].to(dtype), teacher_pooled[rows].to(dtype)),
        regions,
        *per_region,
        dtype=dtype,
        num_images=None,
        num_classes=checks.class_count(student_logits.shape[1], activation),
        **numbers,
        **options,
    )


def gaussian_mask(boxes: Tensor, height: int, width: int, sigma_squared: float) -> Tensor:
    """(height, width) float64: the maximum of the Gaussians inside (G, 4) boxes, in map pixels."""
    boxes = boxes.double()
    boxes = boxes[boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)]
    mask = boxes.new_zeros(height, width)
    y = torch.arange(height, dtype=torch.float64, device=boxes.device)[:, None]
    x = torch.arange(width, dtype=torch.float64, device=boxes.device)[None, :]
    for x1, y1, x2, y2 in boxes:
        inside = (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)
        exponent = gaussian_exponent(x, x1, x2, sigma_squared) + gaussian_exponent(y, y1, y2, sigma_squared)
        mask = torch.maximum(mask, torch.where(inside, exponent.exp(), torch.zeros_like(mask)))
    return mask


def gaussian_feature_loss(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    gt_boxes: Sequence[Tensor],
    *,
    scales: Sequence[float],
    sigma_squared: float = 2.0,
) -> Tensor:
    """Squared distance of the pyramids under a Gaussian at every ground-truth box; a scalar.

    Arguments, results and errors as in :func:`tardkd.ops.gaussian_feature_loss`.
    """
    checks.check_same_pyramids(student_features, teacher_features, scales)
    checks.check_gaussian(gt_boxes, student_features[0], sigma_squared)
    if checks.checking_values():
        checks.check_box_values("gt_boxes", gt_boxes)

    dtype = checks.accumulation_dtype(student_features[0].dtype)
    level_losses = []
    for student, teacher, scale in zip(student_features, teacher_features, scales):
        height, width = student.shape[2:]
        masks = [gaussian_mask(boxes.detach().double() * scale, height, width, sigma_squared) for boxes in gt_boxes]
        mask = torch.stack(masks) if masks else student.new_zeros((0, height, width), dtype=torch.float64)
        # Selecting before the subtraction keeps a NaN outside every box out of the gradient.
        mask = mask[:, None]
        difference = student.to(dtype) - teacher.to(dtype)
        difference = torch.where(mask > 0, difference, torch.zeros_like(difference))
        weighted = (mask.to(dtype) * difference * difference).sum()
        level_losses.append(weighted / (2 * mask.sum().clamp(min=1).to(dtype)))
    return torch.stack(level_losses).mean()
