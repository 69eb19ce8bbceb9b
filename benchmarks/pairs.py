"""Whole training steps of a student and its teacher, both torchvision's, with random weights and images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import rivals
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from tardkd.detectors import for_model
from tardkd.detectors.base import Batch
from tardkd.distill import Distiller, DistillSettings

CLASSES, IMAGES, OBJECTS = 80, 2, 8
# device: student, teacher, height and width of an image
PAIRS = {"cpu": ("resnet18", "resnet34", 320, 480), "cuda": ("resnet50", "resnet101", 800, 1344)}


def detector(backbone: str, height: int, width: int, seed: int, **options: int) -> FasterRCNN:
    torch.manual_seed(seed)
    trunk = resnet_fpn_backbone(backbone_name=backbone, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5)
    return FasterRCNN(trunk, CLASSES + 1, min_size=min(height, width), max_size=max(height, width), **options)


def settle_statistics(model: FasterRCNN, images: list[Tensor]) -> None:
    """Without them, the maps of random weights would explode in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train().backbone(torch.stack(images))
    model.eval()


class Pair:
    """Student, teacher and one batch; a step leaves the weights as they are, and draws the same regions each time."""

    def __init__(self, device: str, tiny: bool = False) -> None:
        student, teacher, height, width = PAIRS[device]
        options = {}
        if tiny:
            student, teacher, height, width = "resnet18", "resnet18", 96, 128
            options = {"box_batch_size_per_image": 16, "rpn_post_nms_top_n_test": 16}
        generator = torch.Generator().manual_seed(0)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator)

        self.names = f"{student}, teacher {teacher}, {IMAGES} x {height} x {width}"
        self.images = [uniform(3, height, width).to(device) for _ in range(IMAGES)]
        self.targets = []
        for _ in range(IMAGES):
            size = (0.1 + 0.4 * uniform(OBJECTS, 2)) * torch.tensor([width, height])
            low = uniform(OBJECTS, 2) * (torch.tensor([width, height]) - size)
            labels = torch.randint(1, CLASSES + 1, (OBJECTS,), generator=generator)
            self.targets.append({"boxes": torch.cat((low, low + size), 1).to(device), "labels": labels.to(device)})
        self.student = detector(student, height, width, 1, **options).to(device)
        self.teacher = detector(teacher, height, width, 2, **options).to(device)
        settle_statistics(self.teacher, self.images)
        self.teacher.requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.0, momentum=0.9)

    def step(self, forward: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        torch.manual_seed(3)
        losses = forward()
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    # --- forward passes of the sides

    def alone(self) -> dict[str, Tensor]:
        return self.student(self.images, self.targets)

    def distiller(self, path: str) -> Distiller:
        return Distiller(
            self.student, self.teacher, DistillSettings(path=path, balance="none", feature_norm="none")
        ).train()

    def with_pytorch(self, pooling: bool, whole_teacher: bool) -> dict[str, Tensor]:
        """The same losses in plain PyTorch, over the foreground, which alone can be open.

        ``pooling``: pools both pyramids again with torchvision, else compares what the box heads have pooled.
        ``whole_teacher``: the teacher predicts too, as whoever calls ``teacher(images)`` has it.
        """
        ours, theirs = for_model(self.student), for_model(self.teacher)
        student = ours.student_pass(Batch(self.images, self.targets))
        regions = student.regions.select(student.regions.labels > 0)
        with torch.no_grad():
            teacher = theirs.teacher_pass(self.images, student.inputs, 1.0)
            if whole_teacher:  # the trunk once, as a hook on it would have it
                batch, maps, sizes, _ = teacher.state
                proposals, _ = self.teacher.rpn(batch, maps)
                self.teacher.roi_heads(maps, proposals, sizes)
            pooled = self.teacher.roi_heads.box_roi_pool(teacher.state[1], regions.proposals, student.inputs.sizes)
            logits, deltas = self.teacher.roi_heads.box_predictor(self.teacher.roi_heads.box_head(pooled))
        per_region = (regions.head.logits, logits, regions.head.boxes, deltas, regions.labels, regions.gt_boxes)
        if pooling:
            loss = rivals.RegionDistill(len(student.features))
            terms = loss(student.features, teacher.features, regions.proposals, student.inputs.sizes, *per_region)
        else:
            terms = rivals.pooled_losses(regions.head.pooled, pooled, torch.cat(regions.proposals), *per_region)
        names = ("distill_feature", "distill_classification", "distill_regression")
        return {**student.losses, **dict(zip(names, terms))}

    def sides(self) -> dict[str, Callable[[], dict[str, Tensor]]]:
        def call(module: nn.Module) -> dict[str, Tensor]:
            return module(self.images, self.targets)

        forward = {"student alone": self.alone}
        for name, path in (("tardkd", "pooled"), ("tardkd, pyramids pooled", "pyramid")):
            forward[name] = partial(call, self.distiller(path))
            without = self.distiller(path)
            [paired] = without._teachers
            paired.detector = Remembered(paired.detector)
            forward[f"{name}, teacher remembered"] = partial(call, without)
        for name, pooling in (("PyTorch", False), ("PyTorch, pyramids pooled", True)):
            forward[name] = partial(self.with_pytorch, pooling, False)
        forward["PyTorch, whole teacher"] = partial(self.with_pytorch, False, True)
        return {name: partial(self.step, function) for name, function in forward.items()}

    # --- the teacher alone

    @torch.no_grad()
    def teacher_trunk(self) -> Any:
        return self.teacher.backbone(torch.stack(self.images))

    @torch.no_grad()
    def whole_teacher(self) -> Any:
        return self.teacher(self.images)


@dataclass
class Remembered:
    """A teacher that does its work once: steps with it show what distilling costs beside the teacher."""

    detector: Any
    results: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.detector, name)
        if name not in ("teacher_pass", "answers"):
            return found

        def once(*arguments: Any) -> Any:
            if name not in self.results:
                self.results[name] = found(*arguments)
            return self.results[name]

        return once
