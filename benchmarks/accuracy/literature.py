"""Losses of other papers, written down from their formulas and constants: what the method is compared with.

Every loss looks at one step of student and teacher and returns a scalar () with its authors' weight in it. Where the
two models have other numbers of channels, the student's maps have passed the same 1x1 convolution as tardkd's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rivals import correlation_loss, imitation_loss
from torch import Tensor, nn
from torchvision.ops import box_iou


@dataclass
class Step:
    """What a loss may look at. L levels, N images, R regions that the student has sampled, K classes."""

    student: list[Tensor]  # L x (N, C, H_l, W_l), with the teacher's number of channels
    teacher: list[Tensor]  # L x (N, C, H_l, W_l)
    scales: list[float]  # of each level: its pixels per input pixel
    boxes: list[Tensor]  # N x (G, 4) xyxy, the objects, in input pixels
    anchors: Callable[[], list[Tensor]]  # L x (H_l, W_l, A, 4) xyxy, in input pixels
    logits: Tensor  # (R, K + 1), the student's, the background first
    labels: Tensor  # (R,) 0 for the background
    answer: Callable[[], Tensor]  # the teacher's logits (R, K + 1) on the same regions


def imitation(step: Step) -> Tensor:
    """Whole maps: their mean squared difference, mean over levels (FitNets' hint, on a pyramid)."""
    return imitation_loss(step.student, step.teacher)


def pkd(step: Step, weight: float = 6.0) -> Tensor:
    """PKD (Cao et al. 2022): half the squared difference of standardised channels; sum over levels."""
    return weight * len(step.student) * correlation_loss(step.student, step.teacher)


def cwd(step: Step, weight: float = 10.0, tau: float = 1.0) -> Tensor:
    """CWD (Shu et al. 2021): each channel as a distribution over the places of its map, and KL; sum over levels."""
    total = step.student[0].new_zeros(())
    for student, teacher in zip(step.student, step.teacher):
        ours, theirs = ((maps.flatten(2) / tau).log_softmax(2) for maps in (student, teacher))
        total = total + F.kl_div(ours, theirs, reduction="sum", log_target=True) / (len(student) * student.shape[1])
    return weight * tau**2 * total


def fgfi(step: Step, weight: float = 0.01, share: float = 0.5) -> Tensor:
    """FGFI (Wang et al. 2019): squared difference, summed over channels, where an anchor is near an object.

    An anchor is near one if their IoU is more than half the largest IoU of any anchor with that object. Mean over
    such places of all levels, halved.
    """
    total, count = step.student[0].new_zeros(()), 0
    for image, boxes in enumerate(step.boxes):
        if not len(boxes):
            continue
        overlaps = [box_iou(level.reshape(-1, 4), boxes).view(*level.shape[:3], -1) for level in step.anchors()]
        largest = torch.stack([overlap.amax((0, 1, 2)) for overlap in overlaps]).amax(0)  # (G,)
        for student, teacher, overlap in zip(step.student, step.teacher, overlaps):
            mask = (overlap > share * largest).any(3).any(2)  # (H, W)
            total = total + ((student[image] - teacher[image]).square().sum(0) * mask).sum()
            count = count + mask.sum()
    return weight * total / (2 * torch.as_tensor(count)).clamp(min=1)


def defeat(
    step: Step, foreground: float = 3.0, background: float = 12.0, classes: tuple[float, float] = (2.0, 2.0)
) -> Tensor:
    """DeFeat (Guo et al. 2021): objects and background apart, at the pyramid and at the head.

    On maps each is the mean squared difference over its places, halved, mean over levels; on logits the mean KL over
    its regions.
    """
    total = step.student[0].new_zeros(())
    for student, teacher, scale in zip(step.student, step.teacher, step.scales):
        inside = box_mask(step.boxes, scale, student.shape[-2:]).to(student.dtype)[:, None]
        squared = (student - teacher).square().mean(1, keepdim=True)
        for weight, mask in ((foreground, inside), (background, 1 - inside)):
            total = total + weight * (squared * mask).sum() / (2 * mask.sum()).clamp(min=1) / len(step.student)
    divergence = F.kl_div(
        step.logits.log_softmax(1), step.answer().log_softmax(1), reduction="none", log_target=True
    ).sum(1)
    is_object = step.labels > 0
    for weight, chosen in zip(classes, (is_object, ~is_object)):
        total = total + weight * (divergence * chosen).sum() / chosen.sum().clamp(min=1)
    return total


class FGD(nn.Module):
    """FGD (Yang et al. 2022), with the weights of its two-stage detectors; sum over levels, each with its own context.

    Focal: squared difference weighted by the teacher's attention over places and channels, objects apart from the
    background, and the L1 distance of the two attentions. Global: squared difference after a context block of each.
    """

    ALPHA, BETA, GAMMA, LAMBDA, TEMPERATURE = 5e-5, 2.5e-5, 5e-5, 5e-7, 0.5

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.student_context = nn.ModuleList(ContextBlock(channels) for _ in range(levels))
        self.teacher_context = nn.ModuleList(ContextBlock(channels) for _ in range(levels))

    def forward(self, step: Step) -> Tensor:
        total = step.student[0].new_zeros(())
        for level, (student, teacher, scale) in enumerate(zip(step.student, step.teacher, step.scales)):
            places, channels = attention(teacher, self.TEMPERATURE)
            own_places, own_channels = attention(student, self.TEMPERATURE)
            squared = (student - teacher).square() * places[:, None] * channels[:, :, None, None]
            objects = size_mask(step.boxes, scale, student.shape[-2:])  # (N, H, W)
            rest = (objects == 0).to(student.dtype)
            rest = rest / rest.sum((1, 2), keepdim=True).clamp(min=1)
            focal = self.ALPHA * (squared * objects[:, None]).sum() + self.BETA * (squared * rest[:, None]).sum()
            attentive = (own_places - places).abs().sum() + (own_channels - channels).abs().sum()
            contexts = self.student_context[level](student), self.teacher_context[level](teacher)
            relation = (contexts[0] - contexts[1]).square().sum()
            total = total + (focal + self.GAMMA * attentive + self.LAMBDA * relation) / len(student)
        return total


class ContextBlock(nn.Module):
    """(N, C, H, W) plus a vector (N, C) that is computed from its places, weighted by a softmax (GcNet's block)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.place = nn.Conv2d(channels, 1, 1)
        self.change = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1),
            nn.LayerNorm([channels // 2, 1, 1]),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 1),
        )
        nn.init.kaiming_normal_(self.place.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.place.bias)
        nn.init.zeros_(self.change[-1].weight)
        nn.init.zeros_(self.change[-1].bias)

    def forward(self, maps: Tensor) -> Tensor:
        weights = self.place(maps).flatten(2).softmax(2)  # (N, 1, H W)
        context = (maps.flatten(2) * weights).sum(2)[:, :, None, None]
        return maps + self.change(context)


def attention(maps: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """FGD's attention of maps (N, C, H, W): over places (N, H, W) and over channels (N, C), of mean 1 each."""
    size = maps.abs()
    places = (size.mean(1).flatten(1) / temperature).softmax(1) * size[0, 0].numel()
    channels = (size.mean((2, 3)) / temperature).softmax(1) * maps.shape[1]
    return places.view_as(size[:, 0]), channels


def box_mask(boxes: Sequence[Tensor], scale: float, size: Sequence[int]) -> Tensor:
    """(N, H, W) bool: the pixels of a map that an object's box, N x (G, 4) in input pixels, touches."""
    return size_mask(boxes, scale, size) > 0


def size_mask(boxes: Sequence[Tensor], scale: float, size: Sequence[int]) -> Tensor:
    """(N, H, W): in a box the inverse of its number of pixels, where boxes meet that of the smallest; 0 outside."""
    mask = torch.zeros(len(boxes), *size)
    for image, of_image in enumerate(boxes):
        low, high = (of_image[:, :2] * scale).floor().int(), (of_image[:, 2:] * scale).ceil().int() + 1
        for (left, top), (right, bottom) in zip(low.tolist(), high.tolist()):
            inside = mask[image, top:bottom, left:right]
            torch.maximum(inside, torch.tensor(1.0 / ((bottom - top) * (right - left))), out=inside)
    return mask.to(boxes[0].device)


# What only two Faster R-CNNs have; the other losses look at maps and objects alone.
OF_TWO_STAGES = {"fgfi": "anchors", "defeat": "box heads"}
LOSSES: dict[str, Callable[[int, int], Callable[[Step], Tensor]]] = {  # made for (channels, levels)
    "imitation": lambda channels, levels: imitation,
    "fgfi": lambda channels, levels: fgfi,
    "defeat": lambda channels, levels: defeat,
    "fgd": FGD,
    "pkd": lambda channels, levels: pkd,
    "cwd": lambda channels, levels: cwd,
}
