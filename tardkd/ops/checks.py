"""Argument checks, shared by the native ops and the reference.

Everything but :func:`check_region_values` and :func:`check_box_values` looks at shapes, dtypes and devices
only: no device synchronisation and no control flow on data, so a call stays compilable and capturable.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BOX_DTYPES = (torch.float32, torch.float64)

CHOICES = {
    "feature_loss": ("squared", "absolute", "smooth_l1"),
    "bin_weight": ("uniform", "gaussian"),
    "feature_gate": ("all", "foreground", "classification", "regression", "either"),
    "classification_gate": ("all", "foreground", "teacher_better"),
    "regression_gate": ("foreground", "vs_proposal", "vs_student"),
    "background": ("first", "last"),
    "activation": ("softmax", "sigmoid"),
    "reduction": ("mean", "sum", "none"),
}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_pair(output_size: int | Sequence[int]) -> tuple[int, int]:
    """``output_size`` as (height, width) in bins."""
    pair = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"output_size must be a positive int or (height, width), got {output_size!r}")
    return pair


# --- options --------------------------------------------------------------------------------------


def check_choices(**options: str) -> None:
    """Refuse an option that is not one of its names in :data:`CHOICES`."""
    for key, value in options.items():
        if value not in CHOICES[key]:
            raise ValueError(f"{key} must be one of {', '.join(CHOICES[key])}; got {value!r}")


def check_loss_numbers(temperature: float, beta: float, box_weights: Sequence[float]) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not beta >= 0:
        raise ValueError(f"beta must not be negative, got {beta}")
    if len(box_weights) != 4 or not min(box_weights) > 0:
        raise ValueError(f"box_weights must be four positive numbers (wx, wy, ww, wh), got {tuple(box_weights)}")


def check_level_rule(canonical_scale: float, canonical_level: int) -> None:
    if not canonical_scale > 0:
        raise ValueError(f"canonical_scale must be positive, got {canonical_scale}")
    if not isinstance(canonical_level, int):
        raise TypeError(f"canonical_level must be an int, got {canonical_level!r}")


# --- tensors --------------------------------------------------------------------------------------


def check_tensor(name: str, tensor: Tensor, shape: str, dtypes: Sequence[torch.dtype]) -> None:
    """``shape`` names the axes, as in "R, C, h, w"; only their number is checked."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor ({shape}), got {type(tensor).__name__}")
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} must have shape ({shape}), got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be one of {', '.join(map(str, dtypes))}; got {tensor.dtype}")


def check_same_device(**named: Tensor) -> None:
    (first_name, first), *others = named.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device} but {first_name} is on {first.device}")


def check_same_precision(**named: Tensor) -> None:
    """The narrower dtypes mix freely (all accumulate in float32); float64 mixes with nothing."""
    (first_name, first), *others = named.items()
    for name, tensor in others:
        if (tensor.dtype == torch.float64) != (first.dtype == torch.float64):
            raise TypeError(f"{name} is {tensor.dtype} but {first_name} is {first.dtype}: float64 mixes with no other")


def check_detached(**named: Tensor) -> None:
    for name, tensor in named.items():
        if tensor.requires_grad:
            raise ValueError(f"{name} requires grad, but no gradient flows into it; pass a detached tensor (.detach())")


# --- pyramids -------------------------------------------------------------------------------------


def check_pyramid(name: str, features: Sequence[Tensor]) -> None:
    """``features``: L x (N, C, H_l, W_l), one dtype, one device."""
    if not isinstance(features, (list, tuple)):
        raise TypeError(f"{name} must be a list of tensors, one per level, got {type(features).__name__}")
    if len(features) == 0:
        raise ValueError(f"{name} must hold at least one level")
    first = features[0]
    for level, feature in enumerate(features):
        check_tensor(f"{name}[{level}]", feature, "N, C, H, W", FEATURE_DTYPES)
        if feature.shape[2] < 1 or feature.shape[3] < 1:
            raise ValueError(f"{name}[{level}] is an empty map of shape {tuple(feature.shape)}")
        if feature.shape[:2] != first.shape[:2]:
            raise ValueError(
                f"{name}[{level}] has {feature.shape[0]} images and {feature.shape[1]} channels "
                f"but {name}[0] has {first.shape[0]} images and {first.shape[1]} channels"
            )
        if feature.dtype != first.dtype:
            raise TypeError(f"{name}[{level}] is {feature.dtype} but {name}[0] is {first.dtype}")
        if feature.device != first.device:
            raise ValueError(f"{name}[{level}] is on {feature.device} but {name}[0] is on {first.device}")


def check_scales(name: str, scales: Sequence[float], features_name: str, features: Sequence[Tensor]) -> None:
    """One positive scale per level, finest level first."""
    if len(scales) != len(features):
        raise ValueError(f"{name} has {len(scales)} scales but {features_name} has {len(features)} levels")
    if not min(scales) > 0:
        raise ValueError(f"{name} must be positive, got {tuple(scales)}")


def check_pyramids(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    student_scales: Sequence[float],
    teacher_scales: Sequence[float] | None,
) -> Sequence[float]:
    """Check both sides and each against the other; returns the teacher's scales."""
    check_pyramid("student_features", student_features)
    check_pyramid("teacher_features", teacher_features)
    check_scales("student_scales", student_scales, "student_features", student_features)
    if teacher_scales is None:
        check_scales("student_scales (teacher_scales is None)", student_scales, "teacher_features", teacher_features)
        teacher_scales = student_scales
    else:
        check_scales("teacher_scales", teacher_scales, "teacher_features", teacher_features)
    check_sides(student_features[0], teacher_features[0], "student_features", "teacher_features", "images")
    for level, feature in enumerate(teacher_features):
        check_detached(**{f"teacher_features[{level}]": feature})
    return teacher_scales


def check_same_pyramids(
    student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], scales: Sequence[float]
) -> None:
    """Both sides have the same levels, level by level of one shape."""
    check_pyramid("student_features", student_features)
    check_pyramid("teacher_features", teacher_features)
    check_scales("scales", scales, "student_features", student_features)
    check_scales("scales", scales, "teacher_features", teacher_features)
    check_sides(student_features[0], teacher_features[0], "student_features", "teacher_features", "images")
    for level, (student, teacher) in enumerate(zip(student_features, teacher_features)):
        if student.shape != teacher.shape:
            raise ValueError(
                f"student_features[{level}] has shape {tuple(student.shape)} "
                f"but teacher_features[{level}] has shape {tuple(teacher.shape)}"
            )
        check_detached(**{f"teacher_features[{level}]": teacher})


def check_gaussian(gt_boxes: Sequence[Tensor], like: Tensor, sigma_squared: float) -> None:
    """``gt_boxes``: N x (G_n, 4), one per image of ``like`` (N, C, H, W)."""
    if not sigma_squared > 0:
        raise ValueError(f"sigma_squared must be positive, got {sigma_squared}")
    check_box_list("gt_boxes", gt_boxes, like.shape[0])
    for boxes in gt_boxes[:1]:
        check_same_device(student_features=like, gt_boxes=boxes)


def check_pooled(student_pooled: Tensor, teacher_pooled: Tensor) -> None:
    """Both (R, C, h, w)."""
    check_tensor("student_pooled", student_pooled, "R, C, h, w", FEATURE_DTYPES)
    check_tensor("teacher_pooled", teacher_pooled, "R, C, h, w", FEATURE_DTYPES)
    check_sides(student_pooled, teacher_pooled, "student_pooled", "teacher_pooled", "regions")
    if student_pooled.shape != teacher_pooled.shape:
        raise ValueError(
            f"student_pooled has shape {tuple(student_pooled.shape)} but teacher_pooled has shape "
            f"{tuple(teacher_pooled.shape)}"
        )
    check_detached(teacher_pooled=teacher_pooled)


def check_sides(student: Tensor, teacher: Tensor, student_name: str, teacher_name: str, rows: str) -> None:
    """The student's (rows, C, ...) against the teacher's."""
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"{student_name} have {student.shape[1]} channels but {teacher_name} have {teacher.shape[1]}; "
            "adapt the student's with a 1x1 convolution"
        )
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"{student_name} have {student.shape[0]} {rows} but {teacher_name} have {teacher.shape[0]}")
    check_same_device(**{student_name: student, teacher_name: teacher})
    check_same_precision(**{student_name: student, teacher_name: teacher})


# --- regions --------------------------------------------------------------------------------------


def as_regions(proposals: Tensor | Sequence[Tensor], num_images: int | None, device: torch.device) -> Tensor:
    """Proposals as (R, 5) [image index, x1, y1, x2, y2], float32 (float64 if given so), detached.

    ``proposals`` is already that, or one (R_n, 4) tensor per image. ``num_images`` None: the number is
    not known and not checked.
    """
    if isinstance(proposals, Tensor):
        check_tensor("proposals", proposals, "R, 5", BOX_DTYPES)
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
        raise ValueError(f"proposals are on {regions.device} but the features are on {device}")
    return regions.detach()


def check_box_list(name: str, boxes: Sequence[Tensor], num_images: int | None) -> None:
    """``boxes``: one (G_n, 4) tensor per image."""
    if not isinstance(boxes, (list, tuple)):
        raise TypeError(f"{name} must be a list of tensors, one per image, got {type(boxes).__name__}")
    if num_images is not None and len(boxes) != num_images:
        raise ValueError(f"{name} has boxes for {len(boxes)} images but the features have {num_images}")
    for image, box in enumerate(boxes):
        check_tensor(f"{name}[{image}]", box, "R, 4", BOX_DTYPES)
        if box.shape[1] != 4:
            raise ValueError(f"{name}[{image}] must have shape (R, 4), got {tuple(box.shape)}")
        if box.device != boxes[0].device:
            raise ValueError(f"{name}[{image}] is on {box.device} but {name}[0] is on {boxes[0].device}")


def check_rows(name: str, tensor: Tensor, regions: Tensor) -> None:
    if tensor.shape[0] != regions.shape[0]:
        raise ValueError(f"{name} has {tensor.shape[0]} rows but proposals hold {regions.shape[0]} regions")


def class_count(logits_width: int, activation: str) -> int:
    """K, the number of foreground classes."""
    return logits_width - 1 if activation == "softmax" else logits_width


def check_region_inputs(
    regions: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_deltas: Tensor,
    teacher_deltas: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
    region_weights: Tensor | None,
    *,
    activation: str,
    like: Tensor,
) -> int:
    """Check what comes with each of the R regions; returns K.

    ``like`` is a student feature: the heads share its device and precision.
    """
    heads = {
        "student_logits": student_logits,
        "teacher_logits": teacher_logits,
        "student_deltas": student_deltas,
        "teacher_deltas": teacher_deltas,
    }
    for name, tensor in heads.items():
        check_tensor(name, tensor, "R, K" if name.endswith("logits") else "R, 4K", FEATURE_DTYPES)
    check_tensor("labels", labels, "R", (torch.int64,))
    check_tensor("gt_boxes", gt_boxes, "R, 4", BOX_DTYPES)
    per_region = {**heads, "labels": labels, "gt_boxes": gt_boxes}
    if region_weights is not None:
        check_tensor("region_weights", region_weights, "R", FEATURE_DTYPES)
        check_detached(region_weights=region_weights)
        per_region["region_weights"] = region_weights
    for name, tensor in per_region.items():
        check_rows(name, tensor, regions)
    check_same_device(student_features=like, **per_region)
    check_same_precision(student_features=like, **heads)
    check_detached(teacher_logits=teacher_logits, teacher_deltas=teacher_deltas)

    if student_logits.shape[1] != teacher_logits.shape[1]:
        raise ValueError(
            f"student_logits have {student_logits.shape[1]} columns but teacher_logits have "
            f"{teacher_logits.shape[1]}: both must tell the same classes apart"
        )
    num_classes = class_count(student_logits.shape[1], activation)
    if num_classes < 1:
        raise ValueError(f"{activation} logits of shape {tuple(student_logits.shape)} hold no foreground class")
    for name in ("student_deltas", "teacher_deltas"):
        width = heads[name].shape[1]
        if width not in (4, 4 * num_classes, 4 * (num_classes + 1)):
            raise ValueError(
                f"{name} have {width} columns, but logits with {num_classes} foreground classes go with "
                f"4, {4 * num_classes} or {4 * (num_classes + 1)}"
            )
    if gt_boxes.shape[1] != 4:
        raise ValueError(f"gt_boxes must have shape (R, 4), got {tuple(gt_boxes.shape)}")
    return num_classes


def check_region_loss(
    like: Tensor,
    num_images: int | None,
    proposals: Tensor | Sequence[Tensor],
    per_region: Sequence[Tensor | None],
    options: Mapping[str, str],
    numbers: Mapping[str, Any],
) -> Tensor:
    """Everything a region loss is given but its features; returns the regions (R, 5).

    ``like``: a student feature. ``per_region``: student and teacher logits, student and teacher deltas, labels,
    gt boxes, region weights or None.
    """
    check_choices(**options)
    check_loss_numbers(**numbers)
    regions = as_regions(proposals, num_images, like.device)
    num_classes = check_region_inputs(regions, *per_region, activation=options["activation"], like=like)
    if checking_values():
        *_, labels, gt_boxes, _ = per_region
        check_region_values(
            regions, num_images, labels, gt_boxes, num_classes=num_classes, background=options["background"]
        )
    return regions


# --- values, on request ---------------------------------------------------------------------------


def checking_values() -> bool:
    """Whether ``TARDKD_CHECK=1`` asks for the checks that read the data (they synchronise the device)."""
    return not torch.compiler.is_compiling() and os.environ.get("TARDKD_CHECK") == "1"


def check_region_values(
    regions: Tensor,
    num_images: int | None,
    labels: Tensor | None = None,
    gt_boxes: Tensor | None = None,
    *,
    num_classes: int = 0,
    background: str = "first",
) -> None:
    """Raise a ValueError that names the first region the ops would leave out, and why.

    With ``num_images`` None the image index has no meaning and only the box is looked at.
    """
    faults = [("the proposal is not finite", ~regions[:, 1:].isfinite().all(1), regions)]
    if num_images is not None:
        image = regions[:, 0].floor()
        in_range = (image >= 0) & (image < num_images)
        faults.append((f"the image index is not in [0, {num_images})", ~in_range, regions))
    if labels is not None and gt_boxes is not None:
        foreground = labels != (0 if background == "first" else num_classes)
        faults.append((f"the label is not in [0, {num_classes}]", (labels < 0) | (labels > num_classes), labels))
        faults.append(("its gt box is not finite", foreground & ~gt_boxes.isfinite().all(1), gt_boxes))

    found = [(int(bad.nonzero()[0]), what, values) for what, bad, values in faults if bool(bad.any())]
    if found:
        index, what, values = min(found, key=lambda fault: fault[0])
        raise ValueError(f"region {index}: {what}: {values[index].tolist()}")


def check_box_values(name: str, boxes: Sequence[Tensor]) -> None:
    """Raise a ValueError that names the first box that is not finite."""
    for image, box in enumerate(boxes):
        rows = (~box.isfinite().all(1)).nonzero()
        if len(rows):
            index = int(rows[0])
            raise ValueError(f"{name}[{image}]: box {index} is not finite, got {box[index].tolist()}")
