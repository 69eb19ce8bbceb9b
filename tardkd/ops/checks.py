"""Argument checks, shared by the native ops and the reference.

Shapes, dtypes and devices alone are looked at: no device is waited for and no control flow depends on data, so that a
call can be compiled and captured. The checks that do read the data stand at the end, and run on request only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .extension import native_module
from .inputs import RegionInputs
from .maps import channels_differ
from .spec import MAX_LEVELS, Activation, Background, LossSpec, class_count, is_foreground, positive

FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BOX_DTYPES = (torch.float32, torch.float64)
LEVEL_DTYPES = (torch.int64, torch.int32)

LARGEST_COORDINATE = torch.finfo(torch.float32).max


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- tensors ----------------------------------------------------------------------------------------------------------


def check_tensor(name: str, tensor: Tensor, axes: tuple[str, ...], dtypes: Sequence[torch.dtype]) -> None:
    """``axes`` names what the tensor's axes are; only their number is checked."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor ({', '.join(axes)}), got {type(tensor).__name__}")
    if tensor.dim() != len(axes):
        raise ValueError(f"{name} must have shape ({', '.join(axes)}), got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {', '.join(map(str, dtypes))}; got {tensor.dtype}")


def check_same_device(first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.device != first.device:
        raise ValueError(f"{name} is on {tensor.device} but {first_name} is on {first.device}")


def check_same_precision(first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    """The narrower dtypes mix freely (all accumulate in float32); float64 mixes with nothing."""
    if (tensor.dtype == torch.float64) != (first.dtype == torch.float64):
        raise TypeError(f"{name} is {tensor.dtype} but {first_name} is {first.dtype}: float64 mixes with no other")


def check_detached(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name} requires grad, but no gradient flows into it; pass a detached tensor (.detach())")


# --- pyramids ---------------------------------------------------------------------------------------------------------


def check_pyramid(name: str, features: Sequence[Tensor], *, same_channels: bool = True) -> None:
    """``features``: L x (N, C_l, H_l, W_l), one dtype, one device; all C_l are equal with ``same_channels``."""
    if not isinstance(features, (list, tuple)):
        raise TypeError(f"{name} must be a list of tensors, one per level, got {type(features).__name__}")
    if len(features) == 0:
        raise ValueError(f"{name} must hold at least one level")
    if len(features) > MAX_LEVELS:
        raise ValueError(f"{name}: a pyramid has at most {MAX_LEVELS} levels, got {len(features)}")
    check_tensor(f"{name}[0]", features[0], ("N", "C", "H", "W"), FEATURE_DTYPES)
    images, channels, _, _ = features[0].shape
    dtype, device = features[0].dtype, features[0].device
    for level, feature in enumerate(features):
        check_tensor(f"{name}[{level}]", feature, ("N", "C", "H", "W"), FEATURE_DTYPES)
        n, c, h, w = feature.shape
        if h < 1 or w < 1:
            raise ValueError(f"{name}[{level}] is an empty map of shape {tuple(feature.shape)}")
        if n != images or (same_channels and c != channels):
            raise ValueError(
                f"{name}[{level}] has {n} images and {c} channels "
                f"but {name}[0] has {images} images and {channels} channels"
            )
        if feature.dtype != dtype:
            raise TypeError(f"{name}[{level}] is {feature.dtype} but {name}[0] is {dtype}")
        if feature.device != device:
            raise ValueError(f"{name}[{level}] is on {feature.device} but {name}[0] is on {device}")


def check_scales(name: str, scales: Sequence[float], features_name: str, features: Sequence[Tensor]) -> None:
    """One positive scale per level, finest level first."""
    if len(scales) != len(features):
        raise ValueError(f"{name} has {len(scales)} scales but {features_name} has {len(features)} levels")
    for scale in scales:
        positive(name, scale)


def check_pyramids(
    student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], *, same_channels: bool = True
) -> None:
    """Check both sides and each against the other."""
    check_pyramid("student_features", student_features, same_channels=same_channels)
    check_pyramid("teacher_features", teacher_features, same_channels=same_channels)
    if channels_differ(student_features) or channels_differ(teacher_features):
        check_channels_of_levels(student_features, teacher_features)
    check_sides(student_features[0], teacher_features[0], "student_features", "teacher_features", "images")
    for level, feature in enumerate(teacher_features):
        check_detached(f"teacher_features[{level}]", feature)


def checked_scales(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    student_scales: Sequence[float],
    teacher_scales: Sequence[float] | None,
) -> tuple[list[float], list[float]]:
    """The scales of both sides, where ``teacher_scales`` None stands for the student's."""
    check_scales("student_scales", student_scales, "student_features", student_features)
    if teacher_scales is None:
        check_scales("student_scales (teacher_scales is None)", student_scales, "teacher_features", teacher_features)
        teacher_scales = student_scales
    else:
        check_scales("teacher_scales", teacher_scales, "teacher_features", teacher_features)
    return list(map(float, student_scales)), list(map(float, teacher_scales))


def check_channels_of_levels(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> None:
    """Where channels differ from level to level, both pyramids have the same ones."""
    remedy = (
        "channels may differ from level to level, but then level by level both sides must have the same: adapt each "
        "of the student's with a 1x1 convolution"
    )
    for level, (student, teacher) in enumerate(zip(student_features, teacher_features)):
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"student_features[{level}] has {student.shape[1]} channels but teacher_features[{level}] has "
                f"{teacher.shape[1]}, where student_features[0] has {student_features[0].shape[1]} channels; {remedy}"
            )
    if len(student_features) != len(teacher_features):
        raise ValueError(
            f"student_features have {len(student_features)} levels but teacher_features have "
            f"{len(teacher_features)}; {remedy}"
        )


def check_same_pyramids(
    student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], scales: Sequence[float]
) -> None:
    """Both sides have the same levels, level by level of one shape."""
    check_pyramid("student_features", student_features, same_channels=False)
    check_pyramid("teacher_features", teacher_features, same_channels=False)
    check_scales("scales", scales, "student_features", student_features)
    check_scales("scales", scales, "teacher_features", teacher_features)
    check_sides(student_features[0], teacher_features[0], "student_features", "teacher_features", "images")
    for level, (student, teacher) in enumerate(zip(student_features, teacher_features)):
        if student.shape != teacher.shape:
            raise ValueError(
                f"student_features[{level}] has shape {tuple(student.shape)} "
                f"but teacher_features[{level}] has shape {tuple(teacher.shape)}"
            )
        check_detached(f"teacher_features[{level}]", teacher)


def check_gaussian(gt_boxes: Sequence[Tensor], like: Tensor, sigma_squared: float) -> None:
    """``gt_boxes``: N x (G_n, 4), one per image of ``like`` (N, C, H, W)."""
    positive("sigma_squared", sigma_squared)
    check_box_list("gt_boxes", gt_boxes, like.shape[0])
    for boxes in gt_boxes[:1]:
        check_same_device("student_features", like, "gt_boxes", boxes)


def check_pooled(student_pooled: Tensor, teacher_pooled: Tensor) -> None:
    """Both (R, C, h, w)."""
    check_tensor("student_pooled", student_pooled, ("R", "C", "h", "w"), FEATURE_DTYPES)
    check_tensor("teacher_pooled", teacher_pooled, ("R", "C", "h", "w"), FEATURE_DTYPES)
    check_sides(student_pooled, teacher_pooled, "student_pooled", "teacher_pooled", "regions")
    if student_pooled.shape != teacher_pooled.shape:
        raise ValueError(
            f"student_pooled has shape {tuple(student_pooled.shape)} but teacher_pooled has shape "
            f"{tuple(teacher_pooled.shape)}"
        )
    check_detached("teacher_pooled", teacher_pooled)


def check_sides(student: Tensor, teacher: Tensor, student_name: str, teacher_name: str, rows: str) -> None:
    """The student's (rows, C, ...) against the teacher's."""
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"{student_name} have {student.shape[1]} channels but {teacher_name} have {teacher.shape[1]}; "
            "adapt the student's with a 1x1 convolution"
        )
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"{student_name} have {student.shape[0]} {rows} but {teacher_name} have {teacher.shape[0]}")
    check_same_device(student_name, student, teacher_name, teacher)
    check_same_precision(student_name, student, teacher_name, teacher)


# --- distributions ----------------------------------------------------------------------------------------------------


def check_distributions(student: Tensor, teacher: Tensor, gates: Tensor, region_weights: Tensor | None) -> None:
    """Both sides (R, 4, bins), the gates (R,) bool and the weights (R,)."""
    student_name, teacher_name = "student_distributions", "teacher_distributions"
    for name, tensor in ((student_name, student), (teacher_name, teacher)):
        check_tensor(name, tensor, ("R", "4", "bins"), FEATURE_DTYPES)
        if tensor.shape[1] != 4 or tensor.shape[2] < 1:
            raise ValueError(f"{name} must have shape (R, 4, bins), got {tuple(tensor.shape)}")
    if student.shape != teacher.shape:
        raise ValueError(
            f"{student_name} has shape {tuple(student.shape)} but {teacher_name} has shape {tuple(teacher.shape)}"
        )
    check_same_device(student_name, student, teacher_name, teacher)
    check_same_precision(student_name, student, teacher_name, teacher)
    check_detached(teacher_name, teacher)
    check_tensor("gates", gates, ("R",), (torch.bool,))
    rows = {"gates": gates}
    if region_weights is not None:
        check_tensor("region_weights", region_weights, ("R",), FEATURE_DTYPES)
        check_detached("region_weights", region_weights)
        rows["region_weights"] = region_weights
    for name, tensor in rows.items():
        if tensor.shape[0] != student.shape[0]:
            raise ValueError(f"{name} has {tensor.shape[0]} rows but {student_name} has {student.shape[0]}")
        check_same_device(student_name, student, name, tensor)


# --- regions ----------------------------------------------------------------------------------------------------------


def as_regions(
    proposals: Tensor | Sequence[Tensor], num_images: int | None, device: torch.device, where: str = "the features"
) -> Tensor:
    """Proposals as (R, 5) [image index, x1, y1, x2, y2], float32 (float64 if given so), detached.

    ``proposals`` is already that, or one (R_n, 4) tensor per image. ``num_images`` None: the number is
    not known and not checked. ``where`` names what is on ``device``.
    """
    if isinstance(proposals, Tensor):
        check_tensor("proposals", proposals, ("R", "5"), BOX_DTYPES)
        if proposals.shape[1] != 5:
            raise ValueError(f"proposals must have shape (R, 5) [image, x1, y1, x2, y2], got {tuple(proposals.shape)}")
        regions = proposals
    else:
        check_box_list("proposals", proposals, num_images)
        if len(proposals) == 0:
            return torch.zeros((0, 5), device=device)
        index = [torch.full_like(boxes[:, :1], image) for image, boxes in enumerate(proposals)]
        regions = torch.cat([torch.cat(index), torch.cat(list(proposals))], dim=1)
    if regions.device != device:
        raise ValueError(f"proposals are on {regions.device} but {where} are on {device}")
    return regions.detach()


def check_box_list(name: str, boxes: Sequence[Tensor], num_images: int | None) -> None:
    """``boxes``: one (G_n, 4) tensor per image."""
    if not isinstance(boxes, (list, tuple)):
        raise TypeError(f"{name} must be a list of tensors, one per image, got {type(boxes).__name__}")
    if num_images is not None and len(boxes) != num_images:
        raise ValueError(f"{name} has boxes for {len(boxes)} images but the features have {num_images}")
    for image, box in enumerate(boxes):
        check_tensor(f"{name}[{image}]", box, ("R", "4"), BOX_DTYPES)
        if box.shape[1] != 4:
            raise ValueError(f"{name}[{image}] must have shape (R, 4), got {tuple(box.shape)}")
        if box.device != boxes[0].device:
            raise ValueError(f"{name}[{image}] is on {box.device} but {name}[0] is on {boxes[0].device}")


def check_per_region(
    name: str,
    tensor: Tensor,
    axes: tuple[str, ...],
    dtypes: Sequence[torch.dtype],
    regions: Tensor,
    like_name: str = "student_features",
) -> None:
    """One row a region, on the device of the ``regions`` (R, 5), which is that of what is called ``like_name``."""
    check_tensor(name, tensor, axes, dtypes)
    if tensor.shape[0] != regions.shape[0]:
        raise ValueError(f"{name} has {tensor.shape[0]} rows but proposals hold {regions.shape[0]} regions")
    if tensor.device != regions.device:
        raise ValueError(f"{name} is on {tensor.device} but {like_name} is on {regions.device}")


def checked_levels(name: str, levels: Tensor | None, regions: Tensor) -> Tensor | None:
    """``levels`` (R,) as int64, one for each of the ``regions`` (R, 5)."""
    if levels is None:
        return None
    check_per_region(name, levels, ("R",), LEVEL_DTYPES, regions)
    return levels.long()


def fit(
    given: RegionInputs,
    activation: Activation,
    *,
    pyramids: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    pooled: tuple[Tensor, Tensor] | None = None,
) -> bool:
    """Whether all that a loss over regions is given is known to pass the checks, which take fifteen times as long.

    The compiled module knows it of plain tensors that go together as they nearly always do. False: it does not know.

    Args:
        given: as to :func:`checked_region_inputs`.
        pyramids: the student's and the teacher's, either L x (N, C, H_l, W_l); None: there are none.
        pooled: the student's and the teacher's pooled features, either (R, C, h, w); None: there are none.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not checking_values() and native_module.fit(given, activation, pyramids, pooled)


def checked_region_inputs(
    given: RegionInputs,
    *,
    loss: LossSpec,
    like: Tensor,
    num_images: int | None,
    like_name: str = "student_features",
    pyramids: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ()),
) -> RegionInputs:
    """What a region loss is given beside its features, each (R, ...) checked against the others.

    Args:
        given: as the loss is, so that the proposals may also be one tensor (R_n, 4) an image; see :func:`as_regions`.
        loss: how the heads' outputs are to be read.
        like: a student's feature, or its logits where there are no features, with whose device and precision the
            others must agree.
        num_images: N; None where the image index of the proposals has no meaning.
        like_name: what ``like`` is called in messages.
        pyramids: the student's and the teacher's, which the levels are of.
    """
    regions = as_regions(given.proposals, num_images, like.device, f"the {like_name.removeprefix('student_')}")
    student_levels = checked_levels("student_levels", given.student_levels, regions)
    teacher_levels = checked_levels("teacher_levels", given.teacher_levels, regions)
    # One tensor for both stays one once converted: the kernels see by that that the sides pool alike.
    if given.teacher_levels is given.student_levels:
        teacher_levels = student_levels
    inputs = given._replace(proposals=regions, student_levels=student_levels, teacher_levels=teacher_levels)
    heads = {"student_logits": "K", "teacher_logits": "K", "student_deltas": "4K", "teacher_deltas": "4K"}
    for name, columns in heads.items():
        check_per_region(name, getattr(inputs, name), ("R", columns), FEATURE_DTYPES, regions, like_name)
        check_same_precision(like_name, like, name, getattr(inputs, name))
    check_per_region("labels", inputs.labels, ("R",), (torch.int64,), regions, like_name)
    check_per_region("gt_boxes", inputs.gt_boxes, ("R", "4"), BOX_DTYPES, regions, like_name)
    if inputs.region_weights is not None:
        check_per_region("region_weights", inputs.region_weights, ("R",), FEATURE_DTYPES, regions, like_name)
        check_detached("region_weights", inputs.region_weights)
    if inputs.student_scores is not None:
        check_per_region("student_scores", inputs.student_scores, ("R",), FEATURE_DTYPES, regions, like_name)
        inputs = inputs._replace(student_scores=inputs.student_scores.detach())
    if inputs.teacher_scores is not None:
        check_per_region("teacher_scores", inputs.teacher_scores, ("R",), FEATURE_DTYPES, regions, like_name)
        check_detached("teacher_scores", inputs.teacher_scores)
    check_detached("teacher_logits", inputs.teacher_logits)
    check_detached("teacher_deltas", inputs.teacher_deltas)
    if inputs.gt_boxes.shape[1] != 4:
        raise ValueError(f"gt_boxes must have shape (R, 4), got {tuple(inputs.gt_boxes.shape)}")
    num_classes = check_head_widths(inputs, loss.activation)
    if checking_values():
        faults = region_faults(regions, num_images) + label_faults(inputs, loss.background, num_classes)
        check_region_values(faults + pair_faults(inputs, *pyramids))
    return inputs


def check_head_widths(inputs: RegionInputs, activation: Activation) -> int:
    """Both heads tell the same classes apart, and have deltas for them; returns K."""
    width = inputs.student_logits.shape[1]
    if width != inputs.teacher_logits.shape[1]:
        raise ValueError(
            f"student_logits have {width} columns but teacher_logits have {inputs.teacher_logits.shape[1]}: "
            "both must tell the same classes apart"
        )
    num_classes = class_count(width, activation)
    if num_classes < 1:
        raise ValueError(f"{activation} logits of shape {tuple(inputs.student_logits.shape)} hold no foreground class")
    known = (4, 4 * num_classes, 4 * (num_classes + 1))
    for name, deltas in (("student_deltas", inputs.student_deltas), ("teacher_deltas", inputs.teacher_deltas)):
        if deltas.shape[1] not in known:
            raise ValueError(
                f"{name} have {deltas.shape[1]} columns, but logits with {num_classes} foreground classes go with "
                f"{known[0]}, {known[1]} or {known[2]}"
            )
    return num_classes


def are_finite(boxes: Tensor) -> Tensor:
    """(R,) bool: the ``boxes`` (R, 4) whose corners are finite float32 numbers, whatever dtype they are stored in.

    Beyond that a box means nothing, and the squares of its sides would not be finite in float64 either.
    """
    return (boxes.abs() <= LARGEST_COORDINATE).all(1)


# --- values, on request -----------------------------------------------------------------------------------------------


def checking_values() -> bool:
    """Whether ``TARDKD_CHECK=1`` asks for the checks that read the data (they synchronise the device)."""
    return not torch.compiler.is_compiling() and os.environ.get("TARDKD_CHECK") == "1"


Faults = list[tuple[str, Tensor, Tensor]]  # what is wrong, (R,) bool where it is, the values to show


def region_faults(regions: Tensor, num_images: int | None) -> Faults:
    """What makes the ops leave out one of the ``regions`` (R, 5).

    With ``num_images`` None the image index has no meaning and only the box is looked at.
    """
    faults = [("the proposal is not finite", ~are_finite(regions[:, 1:]), regions)]
    if num_images is not None:
        image = regions[:, 0].floor()
        in_range = (image >= 0) & (image < num_images)
        faults.append((f"the image index is not in [0, {num_images})", ~in_range, regions))
    return faults


def label_faults(inputs: RegionInputs, background: Background, num_classes: int) -> Faults:
    """What is wrong with a region's label or object.

    The ops leave such a region out, but for a box without extent, which they know nothing wrong of.
    """
    labels, gt_boxes = inputs.labels, inputs.gt_boxes
    is_object = is_foreground(labels, background, num_classes)
    has_extent = (gt_boxes[:, 2:] > gt_boxes[:, :2]).all(1)
    no_extent = "its gt box has x2 <= x1 or y2 <= y1 (gt_boxes must be [x1, y1, x2, y2]; is it [x, y, width, height]?)"
    return [
        (f"the label is not in [0, {num_classes}]", (labels < 0) | (labels > num_classes), labels),
        ("its gt box is not finite", is_object & ~are_finite(gt_boxes), gt_boxes),
        (no_extent, is_object & are_finite(gt_boxes) & ~has_extent, gt_boxes),
    ]


def level_faults(name: str, levels: Tensor | None, count: int) -> Faults:
    """What is wrong with a region's level, of ``levels`` (R,), in a pyramid of ``count``; the ops leave it out."""
    if levels is None:
        return []
    return [(f"its level in {name} is not in [0, {count})", (levels < 0) | (levels >= count), levels)]


def pair_faults(inputs: RegionInputs, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Faults:
    """What is wrong with the levels given for a region; the ops leave it out."""
    student, teacher = inputs.student_levels, inputs.teacher_levels
    faults = level_faults("student_levels", student, len(student_features))
    faults += level_faults("teacher_levels", teacher, len(teacher_features))
    if student is not None and teacher is not None:
        channels = [
            torch.tensor([feature.shape[1] for feature in features], device=levels.device)[
                levels.clamp(0, len(features) - 1)
            ]
            for levels, features in ((student, student_features), (teacher, teacher_features))
        ]
        what = "its levels in student_levels and teacher_levels have different channels"
        faults.append((what, channels[0] != channels[1], torch.stack([student, teacher], 1)))
    return faults


def check_region_values(faults: Faults) -> None:
    """Raise a ValueError that names the first region with a fault."""
    first = [(int(where.nonzero()[0]), what, values) for what, where, values in faults if bool(where.any())]
    if first:
        index, what, values = min(first, key=lambda fault: fault[0])
        raise ValueError(f"region {index}: {what}: {values[index].tolist()}")


def check_box_values(name: str, boxes: Sequence[Tensor]) -> None:
    """Raise a ValueError that names the first box that is not finite."""
    for image, box in enumerate(boxes):
        rows = (~are_finite(box)).nonzero()
        if len(rows):
            index = int(rows[0])
            raise ValueError(f"{name}[{image}]: box {index} is not finite, got {box[index].tolist()}")
