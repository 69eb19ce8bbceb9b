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

from . import distribution, gaussian, region
from . import roi_align as roi_align_calls
from .checks import accumulation_dtype, are_finite
from .inputs import AlignCall, DistributionCall, GaussianCall, RegionCall, RegionInputs, RegionLosses
from .maps import channels_differ
from .signature import function_of
from .spec import (
    NORM_EPSILON,
    Activation,
    Background,
    FeatureLoss,
    LossSpec,
    Reduction,
    RoIAlignSpec,
    class_count,
    first_class_label,
    is_foreground,
)

LEVEL_EPSILON = 1e-6  # torchvision's, added before the floor
MAX_SIZE_DELTA = math.log(1000.0 / 16)  # torchvision's clamp of dw and dh


# --- RoIAlign ---------------------------------------------------------------------------------------------------------


def valid_regions(regions: Tensor, num_images: int | None) -> Tensor:
    """(R,) bool: finite box and, where the number of images is known, an image index in range."""
    valid = are_finite(regions[:, 1:])
    if num_images is not None:
        image = regions[:, 0].floor()
        valid = valid & (image >= 0) & (image < num_images)
    return valid


def levels_exist(levels: Tensor | None, count: int, regions: Tensor) -> Tensor:
    """(R,) bool: whether the given ``levels`` (R,), where there are any, are among the ``count`` of a pyramid."""
    if levels is None:
        return regions.new_ones(len(regions), dtype=torch.bool)
    return (levels >= 0) & (levels < count)


def rows_of(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def region_levels(boxes: Tensor, scales: Sequence[float], canonical_scale: float, canonical_level: int) -> Tensor:
    """Level index of each (R, 4) box: eq. 1 of FPN (Lin et al. 2017), clamped to the octaves that the scales span."""
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
    align: RoIAlignSpec,
) -> Tensor:  # (r, C, h, w)
    """Torchvision's ``roi_align`` on one map."""
    bins_y, bins_x = align.output_size
    image = regions[:, 0].floor().long()
    corners = regions[:, 1:] * scale - (0.5 if align.aligned else 0.0)
    start_x, start_y = corners[:, 0], corners[:, 1]
    extent_x, extent_y = corners[:, 2] - start_x, corners[:, 3] - start_y
    if not align.aligned:
        extent_x, extent_y = extent_x.clamp(min=1), extent_y.clamp(min=1)

    if align.sampling_ratio > 0:
        grids = torch.full((len(regions), 2), align.sampling_ratio, device=regions.device)
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
    features: Sequence[Tensor],  # L x (N, C_l, H_l, W_l)
    regions: Tensor,  # (r, 5), all valid
    scales: Sequence[float],
    align: RoIAlignSpec,
    levels: Tensor | None = None,  # (r,), all in range; None: by the level rule
) -> Tensor:  # (r, C, h, w), accumulation dtype
    """Each region from its level. Every level joins the graph, also one that holds no region.

    C is the most channels that a level has; those that the region's own lacks are zero.
    """
    regions = regions.double()
    if levels is None:
        levels = region_levels(regions[:, 1:], scales, align.canonical_scale, align.canonical_level)
    dtype = accumulation_dtype(features[0].dtype)
    channels = max(feature.shape[1] for feature in features)
    pooled = features[0].new_zeros((len(regions), channels, *align.output_size), dtype=dtype)
    for level, (feature, scale) in enumerate(zip(features, scales)):
        rows = (levels == level).nonzero()[:, 0]
        of_level = roi_align_level(feature.to(dtype), regions[rows], scale, align)
        of_level = F.pad(of_level, (0, 0, 0, 0, 0, channels - feature.shape[1]))
        pooled = pooled.index_add(0, rows, of_level)
    return pooled


def roi_align(call: AlignCall) -> Tensor:
    """(R, C, h, w) in the features' dtype; invalid regions give zeros."""
    features, regions, levels, scales, align = call
    valid = valid_regions(regions, features[0].shape[0]) & levels_exist(levels, len(features), regions)
    rows = valid.nonzero()[:, 0]
    pooled = pool_regions(features, regions[rows], scales, align, rows_of(levels, rows))
    return pooled.new_zeros(len(regions), *pooled.shape[1:]).index_add(0, rows, pooled).to(features[0].dtype)


# --- boxes and classes ------------------------------------------------------------------------------------------------


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


def head_boxes(deltas: Tensor, boxes: Tensor, spec: LossSpec) -> Tensor:
    """(r, 4) boxes that a head means by its (r, 4) ``deltas`` for the (r, 4) proposals ``boxes``."""
    if spec.box_coding == "deltas":
        return decode(deltas, boxes, spec.box_weights)
    low, high = deltas.double().split(2, dim=1)
    return torch.cat([low, torch.maximum(low, high)], dim=1)  # empty, not inverted


def box_differences(student: Tensor, teacher: Tensor, boxes: Tensor, spec: LossSpec) -> Tensor:
    """(r, 4) what the regression term penalises of (r, 4) deltas for the (r, 4) proposals ``boxes``."""
    difference = student - teacher
    if spec.box_coding == "deltas":
        return difference
    low, high = difference.split(2, dim=1)
    boxes = boxes.double()
    side = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    frame = side.new_tensor(spec.box_weights) / side.repeat(1, 2)
    return torch.cat([(low + high) / 2, high - low], dim=1) * frame.to(difference.dtype)


def select_deltas(deltas: Tensor, labels: Tensor, num_classes: int, background: Background) -> Tensor:
    """The (r, 4) deltas of each foreground region's own class."""
    if deltas.shape[1] == 4:
        return deltas
    has_background = deltas.shape[1] == 4 * (num_classes + 1)
    column = labels if has_background else labels - first_class_label(background)
    return deltas.reshape(len(deltas), deltas.shape[1] // 4, 4)[torch.arange(len(deltas), device=deltas.device), column]


def class_scores(
    logits: Tensor, labels: Tensor, foreground: Tensor, activation: Activation, background: Background
) -> Tensor:
    """(r,) p(y) at temperature 1. A sigmoid head has no column for the background: 0 there."""
    rows = torch.arange(len(logits), device=logits.device)
    if activation == "softmax":
        return logits.softmax(1)[rows, labels]
    column = labels - first_class_label(background)
    score = logits.sigmoid()[rows, torch.where(foreground, column, torch.zeros_like(column))]
    return torch.where(foreground, score, torch.zeros_like(score))


# --- gates ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def gates_and_scores(
    inputs: RegionInputs,  # the heads' outputs in the accumulation dtype
    spec: LossSpec,
    num_images: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates (R, 3) bool, scores (R, 4) and foreground (R,) bool; invalid regions are closed and score 0."""
    regions, labels, gt_boxes = inputs.proposals, inputs.labels, inputs.gt_boxes
    num_classes = class_count(inputs.student_logits.shape[1], spec.activation)
    is_object = is_foreground(labels, spec.background, num_classes)
    valid = valid_regions(regions, num_images) & (labels >= 0) & (labels <= num_classes)
    valid = valid & (~is_object | are_finite(gt_boxes))
    foreground = valid & is_object

    scores = inputs.student_logits.new_zeros(len(regions), 4)
    rows = valid.nonzero()[:, 0]
    sides = (inputs.teacher_logits, inputs.teacher_scores), (inputs.student_logits, inputs.student_scores)
    for column, (logits, given) in enumerate(sides):
        if given is None:
            own = class_scores(logits[rows], labels[rows], foreground[rows], spec.activation, spec.background)
        else:
            own = given[rows].to(scores.dtype)
        scores[rows, column] = own

    # IoUs are compared in float64, before the scores round them.
    rows = foreground.nonzero()[:, 0]
    boxes, truth, classes = regions[rows, 1:], gt_boxes[rows], labels[rows]

    def iou_of_head(deltas: Tensor) -> Tensor:
        own = select_deltas(deltas[rows], classes, num_classes, spec.background)
        return pairwise_iou(head_boxes(own, boxes, spec), truth)

    teacher_iou = iou_of_head(inputs.teacher_deltas)
    against_student = spec.regression_gate == "vs_student"
    other_iou = iou_of_head(inputs.student_deltas) if against_student else pairwise_iou(boxes, truth)
    scores[rows, 2] = teacher_iou.to(scores.dtype)
    scores[rows, 3] = other_iou.to(scores.dtype)

    classification = {
        "all": valid,
        "foreground": foreground,
        "teacher_better": foreground & (scores[:, 0] > scores[:, 1]),
    }[spec.classification_gate]
    regression = foreground.clone()
    if spec.regression_gate != "foreground":
        regression[rows] = teacher_iou > other_iou
    feature = {
        "all": valid,
        "foreground": foreground,
        "classification": classification,
        "regression": regression,
        "either": foreground & (classification | regression),
    }[spec.feature_gate]
    return torch.stack([feature, classification, regression], 1), scores, foreground


# --- losses of the open regions ---------------------------------------------------------------------------------------


def penalty(difference: Tensor, kind: FeatureLoss, beta: float) -> Tensor:
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


def divergence(teacher_logits: Tensor, student_logits: Tensor, temperature: float, activation: Activation) -> Tensor:
    """(r,) T^2 KL(teacher || student) at temperature T; for sigmoid heads the sum of the K binary ones."""
    # In float64: at high temperatures the logarithms are nearly equal, and T^2 multiplies what rounding leaves of them.
    dtype, teacher, student = student_logits.dtype, teacher_logits.double(), student_logits.double()
    teacher, student = teacher / temperature, student / temperature
    if activation == "softmax":
        teacher_log, student_log = F.log_softmax(teacher, 1), F.log_softmax(student, 1)
        # A class without mass adds nothing (0 log 0 = 0), also where both logits are -inf.
        has_mass = teacher_log.exp() > 0
        terms = torch.where(has_mass, teacher_log.exp() * (teacher_log - student_log), teacher_log.new_zeros(()))
    else:
        present, absent = (
            F.logsigmoid(sign * teacher).exp() * (F.logsigmoid(sign * teacher) - F.logsigmoid(sign * student))
            for sign in (1, -1)
        )
        terms = present + absent
    return (temperature**2 * terms.sum(1)).to(dtype)


def reduce_regions(losses: Tensor, rows: Tensor, weights: Tensor, num_regions: int, reduction: Reduction) -> Tensor:
    """losses: (r,) of the open regions ``rows``; weights: (R,)."""
    losses = losses * weights[rows]
    if reduction == "none":
        return losses.new_zeros(num_regions).index_add(0, rows, losses)
    return losses.sum() / (max(1, len(rows)) if reduction == "mean" else 1)


def levels_of_sides(call: RegionCall, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(r,) levels of the regions ``rows`` (r,) in the student's and in the teacher's pyramid."""
    assert call.pooling is not None, "pooled features have no levels"
    student_scales, teacher_scales, align = call.pooling
    boxes, inputs = call.inputs.proposals[rows, 1:], call.inputs

    def by_rule(scales: Sequence[float]) -> Tensor:
        return region_levels(boxes, scales, align.canonical_scale, align.canonical_level)

    student = by_rule(student_scales) if inputs.student_levels is None else inputs.student_levels[rows]
    if inputs.teacher_levels is not None:
        return student, inputs.teacher_levels[rows]
    # Where channels differ from level to level, levels of one region have to go together.
    return student, student if channels_differ(call.student_features) else by_rule(teacher_scales)


def pooled_pair(call: RegionCall, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What student and teacher pool of the regions ``rows`` (r,), and of no others.

    Returns:
        (r, C, h, w) of either side in the accumulation dtype, and (r,) by what its channels C outnumber those of the
        region's own level, which come first.
    """
    if call.pooling is None:
        [student], [teacher] = call.student_features, call.teacher_features
        dtype = accumulation_dtype(student.dtype)
        return student[rows].to(dtype), teacher[rows].to(dtype), student.new_ones(len(rows), dtype=dtype)
    student_scales, teacher_scales, align = call.pooling
    student_levels, teacher_levels = levels_of_sides(call, rows)
    regions = call.inputs.proposals[rows]
    student = pool_regions(call.student_features, regions, student_scales, align, student_levels)
    teacher = pool_regions(call.teacher_features, regions, teacher_scales, align, teacher_levels)
    excess = [student.shape[1] / max(1, feature.shape[1]) for feature in call.student_features]
    return student, teacher, student.new_tensor(excess)[student_levels]


def labels_of_pooled(call: RegionCall) -> Tensor:
    """(R,) the labels, -1 where levels that do not exist, or differ in channels, leave a region out."""
    inputs = call.inputs
    student, teacher = inputs.student_levels, inputs.teacher_levels
    exists = levels_exist(student, len(call.student_features), inputs.proposals)
    exists = exists & levels_exist(teacher, len(call.teacher_features), inputs.proposals)
    if student is not None and teacher is not None:
        channels = [
            inputs.labels.new_tensor([feature.shape[1] for feature in features])[levels.clamp(0, len(features) - 1)]
            for levels, features in ((student, call.student_features), (teacher, call.teacher_features))
        ]
        exists = exists & (channels[0] == channels[1])
    return torch.where(exists, inputs.labels, -1)


def standardised(features: Sequence[Tensor]) -> list[Tensor]:
    """``features``, L x (N, C_l, H_l, W_l), of which every channel has mean 0 and variance 1; accumulation dtype."""

    def standardise(feature: Tensor) -> Tensor:
        if feature.numel() == 0:
            return feature
        variance, mean = torch.var_mean(feature, (0, 2, 3), correction=0, keepdim=True)
        return (feature - mean) * (variance + NORM_EPSILON).rsqrt()

    return [standardise(feature.to(accumulation_dtype(feature.dtype))) for feature in features]


def feature_distances(call: RegionCall, rows: Tensor, foreground: Tensor) -> Tensor:
    """(r,) mean penalties of the regions ``rows`` (r,), of which ``foreground`` (r,) bool have an object."""
    inputs, spec = call.inputs, call.loss
    student, teacher, excess = pooled_pair(call, rows)
    bins = penalty(student - teacher, spec.feature_loss, spec.beta)
    if spec.bin_weight == "gaussian":
        weight = gaussian_bin_weights(inputs.proposals[rows, 1:], inputs.gt_boxes[rows], (bins.shape[2], bins.shape[3]))
        weight = torch.where(foreground[:, None, None], weight, torch.zeros_like(weight))
        bins = bins * weight[:, None].to(bins.dtype)
    return bins.mean((1, 2, 3)) * excess


def region_losses(call: RegionCall) -> RegionLosses:
    """Gates and the three losses of shared regions."""
    if call.loss.feature_norm == "channel":
        call = call._replace(
            student_features=standardised(call.student_features),
            teacher_features=standardised(call.teacher_features),
        )
    spec, dtype = call.loss, accumulation_dtype(call.inputs.student_logits.dtype)
    num_images = None if call.pooling is None else call.student_features[0].shape[0]
    inputs = call.inputs._replace(
        labels=labels_of_pooled(call),
        student_logits=call.inputs.student_logits.to(dtype),
        teacher_logits=call.inputs.teacher_logits.to(dtype),
        student_deltas=call.inputs.student_deltas.to(dtype),
        teacher_deltas=call.inputs.teacher_deltas.to(dtype),
    )
    count, num_classes = len(inputs.labels), class_count(inputs.student_logits.shape[1], spec.activation)
    weights = inputs.region_weights
    weights = inputs.student_logits.new_ones(count) if weights is None else weights.to(dtype)
    gates, scores, foreground = gates_and_scores(inputs, spec, num_images)

    rows = gates[:, 0].nonzero()[:, 0]
    if call.student_features:
        distances = feature_distances(call, rows, foreground[rows])
    else:
        distances = inputs.student_logits[rows, :0].sum(1)  # zeros that are part of the graph
    feature = reduce_regions(distances, rows, weights, count, spec.reduction)

    rows = gates[:, 1].nonzero()[:, 0]
    student, teacher = inputs.student_logits[rows], inputs.teacher_logits[rows]
    divergences = divergence(teacher, student, spec.temperature, spec.activation)
    classification = reduce_regions(divergences, rows, weights, count, spec.reduction)

    rows = gates[:, 2].nonzero()[:, 0]
    student, teacher = (
        select_deltas(deltas[rows], inputs.labels[rows], num_classes, spec.background)
        for deltas in (inputs.student_deltas, inputs.teacher_deltas)
    )
    differences = box_differences(student, teacher, inputs.proposals[rows, 1:], spec)
    distances = penalty(differences, "smooth_l1", spec.beta).sum(1)
    regression = reduce_regions(distances, rows, weights, count, spec.reduction)
    return RegionLosses(feature, classification, regression, gates, scores)


# --- Gaussian-mask loss -----------------------------------------------------------------------------------------------


def gaussian_mask(boxes: Tensor, height: int, width: int, sigma_squared: float) -> Tensor:
    """(height, width) float64: the maximum of the Gaussians inside (G, 4) boxes, in map pixels."""
    boxes = boxes.double()
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
    mask = boxes.new_zeros(height, width)
    y = torch.arange(height, dtype=torch.float64, device=boxes.device)[:, None]
    x = torch.arange(width, dtype=torch.float64, device=boxes.device)[None, :]
    for x1, y1, x2, y2 in boxes:
        inside = (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)
        exponent = gaussian_exponent(x, x1, x2, sigma_squared) + gaussian_exponent(y, y1, y2, sigma_squared)
        mask = torch.maximum(mask, torch.where(inside, exponent.exp(), torch.zeros_like(mask)))
    return mask


def gaussian_loss(call: GaussianCall) -> Tensor:
    """Squared distance of the pyramids under a Gaussian at every ground-truth box; a scalar."""
    dtype = accumulation_dtype(call.student_features[0].dtype)
    usable = call.gt_boxes[are_finite(call.gt_boxes[:, 1:])]
    image, boxes = usable[:, 0], usable[:, 1:].double()
    level_losses = []
    for student, teacher, scale in zip(call.student_features, call.teacher_features, call.scales):
        images, _, height, width = student.shape
        mask = student.new_zeros((images, 1, height, width), dtype=torch.float64)
        for n in range(images):
            mask[n, 0] = gaussian_mask(boxes[image == n] * scale, height, width, call.sigma_squared)
        # Selecting before the subtraction keeps a NaN outside every box out of the gradient.
        difference = student.to(dtype) - teacher.to(dtype)
        difference = torch.where(mask > 0, difference, torch.zeros_like(difference))
        weighted = (mask.to(dtype) * difference * difference).sum()
        level_losses.append(weighted / (2 * mask.sum().clamp(min=1).to(dtype)))
    return torch.stack(level_losses).mean()


# --- distributions of boxes' sides ------------------------------------------------------------------------------------


def distribution_loss(call: DistributionCall) -> Tensor:
    """Mean divergence of the four sides' distributions, over the regions with an open gate; () or (R,)."""
    dtype, rows = accumulation_dtype(call.student_distributions.dtype), call.gates.nonzero()[:, 0]
    weights = call.region_weights
    weights = call.gates.new_ones(len(call.gates), dtype=dtype) if weights is None else weights.to(dtype)
    student, teacher = (side[rows].to(dtype).flatten(0, 1) for side in call[:2])
    sides = divergence(teacher, student, call.temperature, "softmax").reshape(len(rows), 4)
    return reduce_regions(sides.mean(1), rows, weights, len(call.gates), call.reduction)


# --- the twins of the public functions --------------------------------------------------------------------------------


def shared_roi_align_pair(calls: tuple[AlignCall, AlignCall]) -> tuple[Tensor, Tensor]:
    student, teacher = calls
    return roi_align(student), roi_align(teacher)


region_distill_loss = function_of(region.region_distill_loss, region_losses, __name__)
pooled_distill_loss = function_of(region.pooled_distill_loss, region_losses, __name__)
head_distill_loss = function_of(region.head_distill_loss, region_losses, __name__)
multiscale_roi_align = function_of(roi_align_calls.multiscale_roi_align, roi_align, __name__)
shared_roi_align = function_of(roi_align_calls.shared_roi_align, shared_roi_align_pair, __name__)
gaussian_feature_loss = function_of(gaussian.gaussian_feature_loss, gaussian_loss, __name__)
distribution_distill_loss = function_of(distribution.distribution_distill_loss, distribution_loss, __name__)
