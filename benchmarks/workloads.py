"""Inputs of the size and shape that training has."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tardkd import ops

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
RECORDED = Path(__file__).with_name("regions.npz")  # by record_regions.py


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

        return replace(
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
        ).with_leaves()

    def with_leaves(self) -> Workload:
        for leaf in self.leaves:
            leaf.requires_grad_()
        return self


def training(
    images: int = 2,
    height: int = 800,
    width: int = 1344,
    regions: int = 512,
    channels: int = 256,
    classes: int = 80,
    seed: int = 0,
) -> Workload:
    """What a training had before it: the regions that ``record_regions.py`` kept, on maps of COCO's size.

    Proposals, what they were matched with, and both models' scores and deltas for the region's own class are those of
    a training on the built-in scenes at 144 pixels (seed 0, to its end), so the gates are its gates. The rest of logits
    and deltas, and the maps, are random. ``regions`` an image: at most 512.
    """
    generator = torch.Generator().manual_seed(seed)
    with np.load(RECORDED) as arrays:
        recorded = {key: torch.from_numpy(arrays[key]) for key in arrays}
    per_image = int(recorded.pop("counts")[0])
    kept = torch.arange(regions) * per_image // regions  # evenly, as the order is by objectness, ground truth last
    # More images than were recorded: the first ones again.
    of_image = torch.arange(images) % (len(recorded["labels"]) // per_image)
    rows = (of_image[:, None] * per_image + kept).flatten()
    recorded = {key: values[rows] for key, values in recorded.items()}
    labels = recorded["labels"]
    sides = torch.tensor([width, height, width, height], dtype=torch.float32)
    every = torch.arange(len(labels))

    def logits(scores: Tensor) -> Tensor:
        """Random ones, but for the class that has a recorded probability."""
        others = torch.randn((len(labels), classes + 1), generator=generator)
        others[every, labels] = -torch.inf
        others[every, labels] = others.logsumexp(1) + scores.clamp(1e-6, 1 - 1e-6).logit()
        return others

    def deltas(own: Tensor) -> Tensor:
        of_classes = 0.5 * torch.randn((len(labels), classes + 1, 4), generator=generator)
        of_classes[every, labels] = own
        return of_classes.flatten(1)

    gt_boxes = recorded["gt_boxes"] * sides
    foreground = labels > 0
    matched = [gt_boxes[rows][foreground[rows]] for rows in every.split(regions)]
    return Workload(
        **pyramids(images, height, width, channels, generator),
        boxes=list((recorded["proposals"] * sides).split(regions)),
        student_logits=logits(recorded["student_scores"]),
        teacher_logits=logits(recorded["teacher_scores"]),
        student_deltas=deltas(recorded["student_deltas"]),
        teacher_deltas=deltas(recorded["teacher_deltas"]),
        labels=labels,
        gt_boxes=gt_boxes,
        gt_per_image=[boxes.unique(dim=0) for boxes in matched],
    ).with_leaves()


def pyramids(images: int, height: int, width: int, channels: int, generator: torch.Generator) -> dict[str, Any]:
    """Both sides' random maps, and the size of the images that they belong to."""

    def maps() -> list[Tensor]:
        sizes = [(math.ceil(height * scale), math.ceil(width * scale)) for scale in SCALES]
        return [torch.randn((images, channels, *size), generator=generator) for size in sizes]

    return dict(student_features=maps(), teacher_features=maps(), image_shapes=[(height, width)] * images)


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
    """``regions`` an image around ``objects`` boxes, any number and share of foreground; random logits and deltas."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

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
    return Workload(
        **pyramids(images, height, width, channels, generator),
        boxes=boxes,
        student_logits=normal(total, classes + 1),
        teacher_logits=normal(total, classes + 1),
        student_deltas=0.5 * normal(total, 4 * (classes + 1)),
        teacher_deltas=0.5 * normal(total, 4 * (classes + 1)),
        labels=torch.cat(labels),
        gt_boxes=torch.cat(matched),
        gt_per_image=objects_of,
    ).with_leaves()
