"""CrossKD against loops over single anchors in float64."""

from __future__ import annotations

import copy
import math
from itertools import product

import pytest
import torch
from accuracy.crosskd import CrossKD
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead

from tardkd.detectors import for_model
from tardkd.detectors.base import StudentPass, TeacherPass

IMAGES = torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SIDES = (16, 32, 48)  # of the anchors of each level
TARGETS = [
    {
        "boxes": torch.tensor([[4.0, 4.0, 30.0, 28.0], [20.0, 30.0, 60.0, 62.0]]).double(),
        "labels": torch.tensor([1, 2]),
    },
    {"boxes": torch.tensor([[8.0, 2.0, 40.0, 36.0]]).double(), "labels": torch.tensor([2])},
]


def retinanet(channels: int, seed: int, ratios: tuple[float, ...] = (0.5, 1.0)) -> RetinaNet:
    torch.manual_seed(seed)
    stages = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.Conv2d(6, 6, 2, 2))
    trunk = BackboneWithFPN(stages, {"0": "0", "1": "1"}, [6, 6], channels)  # and a level by pooling
    generator = AnchorGenerator(tuple((size,) for size in SIDES), (ratios,) * 3)
    head = RetinaNetHead(channels, len(ratios), 3)
    model = RetinaNet(trunk, 3, min_size=64, max_size=64, anchor_generator=generator, head=head)
    for branch in (model.head.classification_head, model.head.regression_head):
        for layer in branch.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.15)
    return model.double()


def passes(student: RetinaNet, teacher: RetinaNet) -> tuple[StudentPass, TeacherPass]:
    own, other = for_model(student.train()), for_model(teacher.eval().requires_grad_(False))
    student_pass = own.student_pass(own.read_call(list(IMAGES), TARGETS))
    with torch.no_grad():
        return student_pass, other.teacher_pass(list(IMAGES), student_pass.inputs, 1.0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def decoded(deltas: list[float], anchor: list[float]) -> list[float]:
    left, top, right, bottom = anchor
    width, height = right - left, bottom - top
    x, y = left + width / 2 + deltas[0] * width, top + height / 2 + deltas[1] * height
    width, height = (
        side * math.exp(min(delta, math.log(1000 / 16))) for side, delta in zip((width, height), deltas[2:])
    )
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def giou(a: list[float], b: list[float]) -> float:
    def area(box: list[float]) -> float:
        return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)

    both = area([*map(max, a[:2], b[:2]), *map(min, a[2:], b[2:])])
    hull = area([*map(min, a[:2], b[:2]), *map(max, a[2:], b[2:])])
    union = area(a) + area(b) - both
    return both / union - (hull - union) / hull


def branch(model: RetinaNet, name: str) -> tuple[nn.Sequential, nn.Conv2d]:
    head = getattr(model.head, f"{name}_head")
    return head.conv, head.cls_logits if name == "classification" else head.bbox_reg


def expected(loss: CrossKD, student: RetinaNet, teacher: RetinaNet, own: Tensor, other: Tensor, scale: int) -> float:
    """The sum over a level's anchors, whose sides are ``scale`` and whose places lie a stride of that over 1 apart."""
    maps = {}
    for name, adapt in zip(("classification", "regression"), loss.adapters):
        ours, theirs = branch(student, name), branch(teacher, name)
        held, begun = other, own
        for layer in range(3):  # the third without its activation
            held, begun = ours_step(theirs[0][layer][0], held, layer), ours_step(ours[0][layer][0], begun, layer)
        begun = adapt(begun)
        for c in range(begun.shape[1]):
            wanted = held[:, c].std(), held[:, c].mean()
            begun = begun.clone()
            begun[:, c] = (begun[:, c] - begun[:, c].mean()) / (begun[:, c].std() + 1e-6) * wanted[0] + wanted[1]
        maps[name] = [theirs[1](theirs[0][3][0](x.clamp(min=0)).clamp(min=0)).detach() for x in (held, begun)]
    total = 0.0
    rows, columns = own.shape[-2:]
    step = 64 // rows
    for n, y, x, a in product(range(2), range(rows), range(columns), range(2)):
        ratio = (0.5, 1.0)[a]
        half = [round(scale / math.sqrt(ratio) / 2), round(scale * math.sqrt(ratio) / 2)]
        anchor = [x * step - half[0], y * step - half[1], x * step + half[0], y * step + half[1]]
        target, logits = (m[n, 3 * a : 3 * a + 3, y, x].tolist() for m in maps["classification"])
        for t, s in zip(map(sigmoid, target), logits):
            total -= (t * math.log(sigmoid(s)) + (1 - t) * math.log(1 - sigmoid(s))) * abs(t - sigmoid(s))
        boxes = [decoded(m[n, 4 * a : 4 * a + 4, y, x].tolist(), anchor) for m in maps["regression"]]
        total += (1 - giou(*boxes)) * sigmoid(max(target))
    return total


def ours_step(layer: nn.Conv2d, maps: Tensor, index: int) -> Tensor:
    found = layer(maps)
    return found if index == 2 else found.clamp(min=0)


@pytest.mark.parametrize("channels", [8, 6])
def test_crosskd(channels):
    student, teacher = retinanet(channels, 1), retinanet(8, 2)
    loss = CrossKD(student, teacher, weight=0.5).double()
    student_pass, teacher_pass = passes(student, teacher)
    levels = zip(student_pass.features, teacher_pass.features, SIDES, strict=True)
    total = sum(expected(loss, student, teacher, own, other, size) for own, other, size in levels)
    positives = max(int((student_pass.regions.labels > 0).sum()), 1)
    found = loss(student_pass, teacher_pass)
    assert found.item() == pytest.approx(0.5 * total / positives, rel=1e-5)
    found.backward()
    assert student.head.regression_head.conv[2][0].weight.grad.any()
    assert student.head.regression_head.conv[3][0].weight.grad is None, "the teacher's head ends it"
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_that_is_its_teacher_has_no_loss():
    teacher = retinanet(8, 2)
    student = copy.deepcopy(teacher)
    student_pass, teacher_pass = passes(student, teacher)
    assert CrossKD(student, teacher)(student_pass, teacher_pass).item() == pytest.approx(0, abs=1e-5)


def test_other_models_are_an_error():
    student = retinanet(8, 1)
    with pytest.raises(ValueError, match="two RetinaNets: RetinaNet and Linear"):
        CrossKD(student, nn.Linear(1, 1))
    with pytest.raises(ValueError, match="the same anchors"):
        CrossKD(student, retinanet(8, 1, ratios=(1.0,)))
