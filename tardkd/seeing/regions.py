"""What a teacher teaches on an image: the distiller's own regions, gates and scores, in the pixels of the image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tardkd.detectors import Detector
from tardkd.distill import Distiller

# What a region's open gates come to; the head's terms first, then the features alone.
LESSONS = ("nothing", "features alone", "class", "box", "class and box")
PER_OBJECT = 2  # regions of one object that are picked, for they lie on top of each other
COLUMNS = (
    "image_id",
    "class",
    "x1",
    "y1",
    "x2",
    "y2",
    "object_x1",
    "object_y1",
    "object_x2",
    "object_y2",
    "teacher_score",
    "student_score",
    "teacher_iou",
    "other_iou",
    "gate_feature",
    "gate_classification",
    "gate_regression",
)


@dataclass
class TaughtRegions:
    """The R shared regions of one image, on the CPU. A gate counts as open only where its term has weight."""

    image_id: int
    boxes: Tensor  # (R, 4) xyxy, pixels of the image
    labels: Tensor  # (R,) 1..K, or 0 for background
    objects: Tensor  # (R, 4) xyxy of the object that the region was matched with; none for background
    gates: Tensor  # (R, 3) bool: feature, classification, regression
    scores: Tensor  # (R, 4): p_T(y), p_S(y), IoU of the teacher's box, IoU it was compared with

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor) -> TaughtRegions:
        parts = (self.boxes, self.labels, self.objects, self.gates, self.scores)
        return TaughtRegions(self.image_id, *(part[index] for part in parts))

    def foreground(self) -> TaughtRegions:
        return self[self.labels > 0]

    def lessons(self) -> list[str]:
        """One of ``LESSONS`` for every region."""
        return [
            LESSONS[2 * box + klass + 1] if klass or box else LESSONS[feature]
            for feature, klass, box in self.gates.int().tolist()
        ]

    def pick(self, count: int) -> TaughtRegions:
        """The regions where teacher and student differ most, in score or in IoU.

        One of each object comes before the second of any.
        """
        differences = (self.scores[:, 0] - self.scores[:, 1]).abs() + (self.scores[:, 2] - self.scores[:, 3]).abs()
        turns_of: Counter[tuple[float, ...]] = Counter()
        turns = []
        for i in differences.argsort(descending=True, stable=True).tolist():
            thing = tuple(self.objects[i].tolist())
            turns.append((turns_of[thing], i))
            turns_of[thing] += 1
        chosen = sorted((turn for turn in turns if turn[0] < PER_OBJECT), key=lambda turn: turn[0])[:count]
        chosen.sort(key=lambda turn: -differences[turn[1]])
        return self[torch.tensor([i for _, i in chosen], dtype=torch.int64)]

    def rows(self, class_names: Sequence[str]) -> Iterator[list[Any]]:
        """For a table with ``COLUMNS``; a background region has no object."""
        for box, label, thing, gates, scores in zip(
            self.boxes.tolist(),
            self.labels.tolist(),
            self.objects.tolist(),
            self.gates.int().tolist(),
            self.scores.tolist(),
        ):
            name = class_names[label - 1] if label else "background"
            corners = [f"{value:.2f}" for value in box] + [f"{value:.2f}" if label else "" for value in thing]
            yield [self.image_id, name, *corners, *(f"{value:.4f}" for value in scores), *gates]


def look_at(distiller: Distiller, image: Tensor, target: dict[str, Any], *, seed: int = 0) -> TaughtRegions:
    """Run one step of the distillation on one image without learning from it; no weight or statistic changes.

    Args:
        image: (3, H, W) float in [0, 1]. target: its objects, as in training.
        seed: of the sampling of proposals, which else would differ from call to call.
    """
    device = next(distiller.parameters()).device
    target = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in target.items()}
    with _training_view(distiller.student), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        student, found = distiller.look([image.to(device)], [target])
    (height, width), (input_height, input_width) = image.shape[-2:], student.inputs.sizes[0]
    scale = torch.tensor([width / input_width, height / input_height] * 2)
    weights = distiller.settings.gate_weights
    weighted = torch.tensor([weights[name] > 0 for name in ("feature", "classification", "regression")])
    parts = []  # for each teacher: boxes, labels, objects, gates, scores
    for teacher, regions, losses in found:
        labels = teacher.classes.to_student(regions.labels)
        parts.append(
            (
                regions.proposals[0].float().cpu() * scale,
                labels.cpu(),
                regions.gt_boxes.float().cpu() * scale,
                losses.gates.bool().cpu() & weighted,
                losses.scores.float().cpu(),
            )
        )
    return TaughtRegions(int(target["image_id"]), *map(torch.cat, zip(*parts)))


def detect(detector: Detector, image: Tensor) -> dict[str, Tensor]:
    """What the model finds on an image (3, H, W) in [0, 1]."""
    model = detector.model
    device = next(model.parameters()).device
    training = model.training
    with torch.inference_mode():
        model.eval()
        detections = detector.detect([image.to(device)])[0]
    model.train(training)
    return detections


def teachers_detections(distiller: Distiller, image: Tensor) -> dict[str, Tensor]:
    """What the teachers find of the classes that they teach, under the student's labels."""
    device = next(distiller.parameters()).device
    found = []
    for teacher in distiller.frozen_teachers:
        teacher.model.to(device)
        found.append(teacher.classes.detections(detect(teacher.detector, image)))
    return {key: torch.cat([boxes[key] for boxes in found]) for key in ("boxes", "labels", "scores")}


@contextmanager
def _training_view(model: nn.Module) -> Iterator[None]:
    """Training mode, in which a detector samples proposals, but normalising as in use and without keeping count."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module in modes:
        if isinstance(module, _BatchNorm):
            module.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
