"""Inputs of the size and shape that training has."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tardkd import ops

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)


@dataclass
class Workload:
    """Two pyramids and what two heads say of R shared regions."""

    student_features: list[Tensor]  # L x (N, C, H_l, W_l)
    teacher_features: list[Tensor]
    boxes: list[Tensor]  # N x (R / N, 4)
    image_shapes: list[tuple[int, int]]
    student_logits: Tensor  # (R, K + 1)
    teacher_logits: Tensor
    student_deltas: Tensor  # (R, 4 (K + 1))
    teacher_deltas: Tensor
    labels: Tensor  # (R,)
    gt_boxes: Tensor  # (R, 4)
    gt_per_image: list[Tensor]  # N x (G, 4)

    @property
    def per_region(self) -> tuple[Tensor, ...]:
        return (
            self.student_logits,
            self.teacher_logits,
            self.student_deltas,
            self.teacher_deltas,
            self.labels,
            self.gt_boxes,
        )

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.student_features, self.student_logits, self.student_deltas]

    @cached_property
    def pooled(self) -> tuple[Tensor, Tensor]:
        """Both sides' regions (R, C, 7, 7), as box heads hold them; the student's is a leaf."""
        with torch.no_grad():
            student, teacher = ops.shared_roi_align(
                self.student_features, self.teacher_features, self.boxes, student_scales=SCALES
            )
        return student.requires_grad_(), teacher

    @property
    def pooled_leaves(self) -> list[Tensor]:
        return [self.pooled[0], self.student_logits, self.student_deltas]

    @property
    def sizes(self) -> str:
        height, width = self.image_shapes[0]
        channels, classes = self.student_features[0].shape[1], self.student_logits.shape[1] - 1
        return (
            f"{len(self.boxes)} x {height} x {width}, {len(self.boxes[0])} regions an image, {channels} channels, "
            f"{classes} classes"
        )

    def to(self, device: str, dtype: torch.dtype, channels_last: bool) -> Workload:
        """A copy: what networks compute in ``dtype``, boxes in float32."""
        memory_format = torch.channels_last if channels_last else torch.contiguous_format

        def maps(features: list[Tensor]) -> list[Tensor]:
            return [f.detach().to(device, dtype, copy=True, memory_format=memory_format) for f in features]

        def head(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype, copy=True)

        copy = replace(
            self,
            student_features=maps(self.student_features),
            teacher_features=maps(self.teacher_features),
            boxes=[boxes.to(device) for boxes in self.boxes],
            student_logits=head(self.student_logits),
            teacher_logits=head(self.teacher_logits),
            student_deltas=head(self.student_deltas),
            teacher_deltas=head(self.teacher_deltas),
            labels=self.labels.to(device),
            gt_boxes=self.gt_boxes.to(device),
            gt_per_image=[boxes.to(device) for boxes in self.gt_per_image],
        )
        for leaf in copy.leaves:
            leaf.requires_grad_()
        return copy


def coco(
    images: int = 2,
    height: int = 800,
    width: int = 1344,
    regions: int = 512,
    channels: int = 256,
    classes: int = 80,
    objects: int = 12,
    foreground: float = 0.25,
    seed: int = 0,
) -> Workload:
    """``regions`` an image around ``objects`` boxes: foreground ones overlap an object closely, as in training."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def pyramid() -> list[Tensor]:
        return [normal(images, channels, math.ceil(height * s), math.ceil(width * s)) for s in SCALES]

    def clip(boxes: Tensor) -> Tensor:
        limit = torch.tensor([width, height, width, height])
        return boxes.clamp(min=0).minimum(limit)

    boxes, labels, matched, objects_of = [], [], [], []
    for _ in range(images):
        # COCO's objects: side lengths roughly log-uniform from 16 to 512 pixels, aspect ratios around 1.
        side = uniform(objects, low=math.log(16), high=math.log(512)).exp().clamp(max=height)
        aspect = (0.35 * normal(objects)).exp().sqrt()
        half = torch.stack((side * aspect, side / aspect), 1) / 2
        centre = uniform(objects, 2) * torch.tensor([width, height])
        gt = clip(torch.cat((centre - half, centre + half), 1))
        gt[:, 2:] = torch.maximum(gt[:, 2:], gt[:, :2] + 8)
        category = torch.randint(1, classes + 1, (objects,), generator=generator)

        owner = torch.randint(0, objects, (regions,), generator=generator)
        is_foreground = torch.arange(regions) < round(regions * foreground)
        # Foreground proposals keep IoU >= 0.5 or so with their object; background ones are shifted by its own size.
        jitter = torch.where(is_foreground[:, None], 0.08, 0.6) * normal(regions, 4)
        extent = (gt[:, 2:] - gt[:, :2])[owner].repeat(1, 2)
        proposal = clip(gt[owner] + jitter * extent)
        proposal = torch.cat((proposal[:, :2].minimum(proposal[:, 2:] - 1), proposal[:, 2:]), 1)
        boxes.append(proposal)
        labels.append(torch.where(is_foreground, category[owner], 0))
        matched.append(gt[owner])
        objects_of.append(gt)

    total = images * regions
    workload = Workload(
        student_features=pyramid(),
        teacher_features=pyramid(),
        boxes=boxes,
        image_shapes=[(height, width)] * images,
        student_logits=normal(total, classes + 1),
        teacher_logits=normal(total, classes + 1),
        student_deltas=0.5 * normal(total, 4 * (classes + 1)),
        teacher_deltas=0.5 * normal(total, 4 * (classes + 1)),
        labels=torch.cat(labels),
        gt_boxes=torch.cat(matched),
        gt_per_image=objects_of,
    )
    for leaf in workload.leaves:
        leaf.requires_grad_()
    return workload
