"""tardkd's fused losses in a training loop of your own, without a detector, a distiller or a data set.

    python examples/ops_alone.py --steps 60

A region loss wants, for the same R regions, both models' feature pyramids, class logits and box deltas. Where they come
from is up to you. Here the student is a convolution with two linear heads, and the teacher is made up: it mostly knows
the classes and the boxes, as a good detector would.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from tardkd import ops

IMAGES, REGIONS, CLASSES, CHANNELS, SIZE = 2, 32, 5, 16, 128  # REGIONS of each image; CLASSES without the background
SCALES = (1 / 4, 1 / 8)  # pixels of each map per pixel of the image
LEVEL_RULE = dict(canonical_scale=56, canonical_level=3)  # regions of 56 pixels a side are pooled at stride 8


class Student(nn.Module):
    """A pyramid of two levels and a box head, as small as they get."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, stride=4, padding=1)
        self.down = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1)
        # This is torchvision's MultiScaleRoIAlign with another import: same arguments, same call, same result.
        self.pool = ops.MultiScaleRoIAlign(["fine", "coarse"], output_size=7, sampling_ratio=2, **LEVEL_RULE)
        self.logits = nn.Linear(CHANNELS * 7 * 7, CLASSES + 1)  # the background is class 0, as in torchvision
        self.deltas = nn.Linear(CHANNELS * 7 * 7, 4)  # one box a region, whatever its class

    def forward(self, images: Tensor, proposals: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        """Images (N, 3, H, W) and N proposals (R_n, 4) to the pyramid, logits (R, K + 1) and deltas (R, 4)."""
        fine = self.stem(images).relu()
        maps = {"fine": fine, "coarse": self.down(fine)}
        pooled = self.pool(maps, proposals, [tuple(images.shape[-2:])] * len(images)).flatten(1)
        return list(maps.values()), self.logits(pooled), self.deltas(pooled)


def make_regions(generator: torch.Generator) -> tuple[list[Tensor], Tensor, Tensor]:
    """Proposals N x (R_n, 4), labels (R,) and matched objects (R, 4); every fourth region is background."""
    corners = torch.rand(IMAGES, REGIONS, 2, generator=generator) * SIZE / 2
    sides = 16 + torch.rand(IMAGES, REGIONS, 2, generator=generator) * (SIZE / 2 - 16)
    objects = torch.cat([corners, corners + sides], dim=2)
    shift = 0.15 * sides * torch.randn(IMAGES, REGIONS, 2, generator=generator)
    proposals = (objects + shift.repeat(1, 1, 2)).clamp(0, SIZE)
    labels = torch.randint(1, CLASSES + 1, (IMAGES, REGIONS), generator=generator)
    labels[:, ::4] = 0
    return list(proposals), labels.flatten(), objects.flatten(0, 1)


def make_teacher(
    proposals: list[Tensor], labels: Tensor, objects: Tensor, generator: torch.Generator
) -> tuple[list[Tensor], Tensor, Tensor]:
    """What a trained teacher would say of these regions: its pyramid, logits (R, K + 1) and deltas (R, 4)."""
    features = [torch.randn(IMAGES, CHANNELS, int(SIZE * s), int(SIZE * s), generator=generator) for s in SCALES]
    logits = 2 * nn.functional.one_hot(labels, CLASSES + 1) + torch.randn(len(labels), CLASSES + 1, generator=generator)
    deltas = encode(objects, torch.cat(proposals))
    return features, logits, deltas + 0.3 * torch.randn(deltas.shape, generator=generator)


def encode(boxes: Tensor, proposals: Tensor) -> Tensor:
    """Boxes (R, 4) as deltas (R, 4) to proposals (R, 4): Faster R-CNN's coding with the weights 10, 10, 5, 5."""
    sides, wanted = proposals[:, 2:] - proposals[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (boxes[:, :2] + wanted / 2 - proposals[:, :2] - sides / 2) / sides
    return torch.cat([10 * shift, 5 * (wanted / sides).log()], dim=1)


def train(steps: int) -> list[float]:
    """The distillation loss of every step."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(IMAGES, 3, SIZE, SIZE, generator=generator)
    proposals, labels, objects = make_regions(generator)
    teacher_features, teacher_logits, teacher_deltas = make_teacher(proposals, labels, objects, generator)
    student = Student()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    history = []
    for step in range(steps):
        features, logits, deltas = student(images, proposals)
        losses = ops.region_distill_loss(
            features,
            teacher_features,
            proposals,
            logits,
            teacher_logits,
            deltas,
            teacher_deltas,
            labels,
            objects,
            student_scales=SCALES,
            **LEVEL_RULE,
        )
        loss = losses.feature + losses.classification + losses.regression
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        # A gate is open where the teacher does better than the student (for boxes: than the proposal), so the class
        # gates close one after another while the student learns.
        opened = losses.gates[labels > 0].float().mean(dim=0)  # of the foreground: feature, classification, regression
        print(f"step {step:3d}: loss {loss:.3f}, gates open", *(f"{share:.0%}" for share in opened))
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description="tardkd's ops in a loop of your own")
    parser.add_argument("--steps", type=int, default=60)
    train(parser.parse_args().steps)


if __name__ == "__main__":
    main()
