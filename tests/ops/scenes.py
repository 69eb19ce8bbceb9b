"""Random but reproducible inputs for the ops: pyramids, shared regions and what both heads say of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

IMAGE_SIZE = (96, 160)  # (height, width) of the student's input in pixels
LEVEL_RULE = dict(canonical_scale=56, canonical_level=4)  # small, so that small images use every level

# (student, teacher): per side the size of its input relative to the student's, and its strides.
GEOMETRIES = {
    "equal": ((1.0, (4, 8, 16, 32)), (1.0, (4, 8, 16, 32))),
    "strides": ((1.0, (4, 8, 16, 32)), (1.0, (8, 16, 32))),
    "levels": ((1.0, (8, 16)), (1.0, (4, 8, 16, 32, 64))),
    "resolution": ((1.0, (4, 8, 16)), (1.7, (4, 8, 16))),
    "repeated": ((1.0, (8, 8, 16)), (1.0, (4, 4, 4))),  # as torchvision's MobileNet pyramids repeat a stride
    "single": ((1.0, (16,)), (1.0, (8,))),
    "eight": ((1.0, (1, 2, 4, 8, 16, 32, 64, 128)), (1.0, (2, 4, 8, 16, 32, 64, 128, 256))),  # as many as there may be
}


def _sliced(feature: Tensor) -> Tensor:
    n, c, h, w = feature.shape
    base = feature.new_full((n, c + 2, h + 1, w + 3), float("nan"))
    view = base[:, 1 : c + 1, 1:, 2 : w + 2]
    return view.copy_(feature)


def _transposed(feature: Tensor) -> Tensor:
    return feature.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda feature: feature.contiguous(),
    "channels_last": lambda feature: feature.contiguous(memory_format=torch.channels_last),
    "sliced": _sliced,
    "transposed": _transposed,
}


@dataclasses.dataclass
class Scene:
    """The arguments of the region losses; ``K`` foreground classes."""

    student_features: list[Tensor]
    teacher_features: list[Tensor]
    proposals: Tensor  # (R, 5)
    student_logits: Tensor
    teacher_logits: Tensor
    student_deltas: Tensor
    teacher_deltas: Tensor
    labels: Tensor
    gt_boxes: Tensor
    region_weights: Tensor
    student_scales: list[float]
    teacher_scales: list[float]
    num_classes: int

    @property
    def heads(self) -> tuple[Tensor, ...]:
        return self.student_logits, self.teacher_logits, self.student_deltas, self.teacher_deltas

    @property
    def per_region(self) -> tuple[Tensor, ...]:
        return self.proposals, *self.heads, self.labels, self.gt_boxes

    @property
    def inputs(self) -> tuple:
        """The positional arguments of ``region_distill_loss``."""
        return self.student_features, self.teacher_features, *self.per_region

    @property
    def scales(self) -> dict[str, list[float]]:
        return dict(student_scales=self.student_scales, teacher_scales=self.teacher_scales)

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients flow into: the student's features, logits and deltas."""
        return [*self.student_features, self.student_logits, self.student_deltas]

    def replace(self, **fields: object) -> Scene:
        return dataclasses.replace(self, **fields)

    def to(
        self,
        student: torch.dtype,
        teacher: torch.dtype | None = None,
        student_layout: str = "nchw",
        teacher_layout: str = "nchw",
        device: torch.device | str = "cpu",
    ) -> Scene:
        """A copy in these dtypes and layouts whose :attr:`leaves` require grad."""
        teacher = teacher or student

        def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
            return x.detach().to(device, dtype, copy=True)

        scene = copy.copy(self)
        scene.student_features = [LAYOUTS[student_layout](cast(f, student)) for f in self.student_features]
        scene.teacher_features = [LAYOUTS[teacher_layout](cast(f, teacher)) for f in self.teacher_features]
        scene.student_logits, scene.student_deltas = (
            cast(self.student_logits, student),
            cast(self.student_deltas, student),
        )
        scene.teacher_logits, scene.teacher_deltas = (
            cast(self.teacher_logits, teacher),
            cast(self.teacher_deltas, teacher),
        )
        for name in ("proposals", "labels", "gt_boxes", "region_weights"):
            setattr(scene, name, getattr(self, name).to(device))
        for leaf in scene.leaves:
            leaf.requires_grad_()
        return scene

    def doubled(self) -> Scene:
        """The same numbers in float64, on the same device: what the expected values are computed from."""
        return self.to(torch.float64, device=self.labels.device)

    def rows(self, index: Tensor) -> Scene:
        """Only these regions."""
        names = [f.name for f in dataclasses.fields(self) if isinstance(getattr(self, f.name), Tensor)]
        return self.replace(**{name: getattr(self, name)[index] for name in names})


def make_pyramid(
    generator: torch.Generator, images: int, channels: int, resolution: float, strides: tuple[int, ...]
) -> tuple[list[Tensor], list[float]]:
    """Features in float64 and one scale per level, relative to the student's input."""
    features = []
    for stride in strides:
        height, width = (max(1, round(size * resolution / stride)) for size in IMAGE_SIZE)
        features.append(torch.randn(images, channels, height, width, generator=generator, dtype=torch.float64))
    return features, [resolution / stride for stride in strides]


def make_boxes(generator: torch.Generator, count: int) -> Tensor:
    """(count, 4) boxes, float32: ordinary ones, and in turn the awkward kinds."""
    height, width = IMAGE_SIZE
    uniform = torch.rand(count, 4, generator=generator)
    x = uniform[:, 0] * width * 0.9
    y = uniform[:, 1] * height * 0.9
    w = 4 + uniform[:, 2] ** 2 * width * 0.7
    h = 4 + uniform[:, 3] ** 2 * height * 0.7
    boxes = torch.stack([x, y, (x + w).clamp(max=width), (y + h).clamp(max=height)], dim=1)
    awkward = [
        [-20.5, -13.2, 31.0, 22.7],  # over the top left corner
        [140.0, 70.5, 199.3, 131.0],  # over the bottom right corner
        [50.3, 40.7, 50.8, 41.1],  # smaller than a pixel
        [0.0, 30.2, 160.0, 33.0],  # a strip as wide as the image
        [70.1, 0.0, 73.0, 96.0],  # a strip as high as the image
        [0.0, 0.0, 160.0, 96.0],  # the image
        [-300.0, -200.0, 500.0, 400.0],  # much larger than the image
        [400.0, 300.0, 460.0, 350.0],  # outside of it
        [64.0, 32.0, 96.0, 64.0],  # on pixel borders
        [60.0, 20.0, 60.0, 20.0],  # a point
    ]
    for row, box in zip(range(1, count, 2), awkward):  # every other row
        boxes[row] = torch.tensor(box)
    return boxes


def encode(boxes: Tensor, targets: Tensor) -> Tensor:
    """Deltas that take boxes to targets, box weights (10, 10, 5, 5)."""
    size, target_size = (
        (boxes[:, 2:] - boxes[:, :2]).clamp(min=0.1),
        (targets[:, 2:] - targets[:, :2]).clamp(min=0.1),
    )
    shift = (targets[:, :2] + targets[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2 / size
    return torch.cat([10 * shift, 5 * (target_size / size).log()], dim=1)


def make_scene(
    seed: int = 0,
    *,
    regions: int = 32,
    classes: int = 3,
    images: int = 2,
    channels: int = 5,
    geometry: str = "equal",
    activation: str = "softmax",
    background: str = "first",
    student_deltas: str = "specific+background",
    teacher_deltas: str = "specific+background",
    box_coding: str = "deltas",
) -> Scene:
    """In float64 (boxes float32). Half the regions are background, half the gates of the others open."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    (student_side, teacher_side) = GEOMETRIES[geometry]
    student_features, student_scales = make_pyramid(generator, images, channels, *student_side)
    teacher_features, teacher_scales = make_pyramid(generator, images, channels, *teacher_side)

    boxes = make_boxes(generator, regions)
    image = torch.randint(images, (regions, 1), generator=generator).float()
    foreground = torch.rand(regions, generator=generator) < 0.6
    number = torch.randint(classes, (regions,), generator=generator)  # class, counted from 0
    if background == "first":
        labels = torch.where(foreground, number + 1, 0)
    else:
        labels = torch.where(foreground, number, classes)

    size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    gt_boxes = boxes + 0.1 * size * randn(regions, 4).float()  # also of background, where nothing may read them

    width = classes + 1 if activation == "softmax" else classes
    student_logits, teacher_logits = randn(regions, width), randn(regions, width)

    def boxes_of_head(form: str, noise: float) -> Tensor:
        own = gt_boxes.double() + 0.1 * noise * size.double() * randn(regions, 4)
        if form == "agnostic":
            return own
        columns = classes + 1 if form == "specific+background" else classes
        first = 1 if background == "first" and form == "specific+background" else 0
        all_classes = boxes.double()[:, None] + 0.3 * size.double()[:, None] * randn(regions, columns, 4)
        all_classes[torch.arange(regions), number + first] = own
        return all_classes.flatten(1)

    def deltas(form: str, noise: float) -> Tensor:
        if box_coding == "boxes":
            return boxes_of_head(form, noise)
        own = encode(boxes.double(), gt_boxes.double())
        if form == "agnostic":
            return own + noise * randn(regions, 4)
        columns = classes + 1 if form == "specific+background" else classes
        first = 1 if background == "first" and form == "specific+background" else 0
        all_classes = randn(regions, columns, 4)
        all_classes[torch.arange(regions), number + first] = own + noise * randn(regions, 4)
        return all_classes.flatten(1)

    return Scene(
        student_features=student_features,
        teacher_features=teacher_features,
        proposals=torch.cat([image, boxes], dim=1),
        student_logits=student_logits,
        teacher_logits=teacher_logits,
        student_deltas=deltas(student_deltas, 0.9),
        teacher_deltas=deltas(teacher_deltas, 0.7),
        labels=labels,
        gt_boxes=gt_boxes,
        region_weights=torch.rand(regions, generator=generator) + 0.5,
        student_scales=student_scales,
        teacher_scales=teacher_scales,
        num_classes=classes,
    )
