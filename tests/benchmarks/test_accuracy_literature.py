"""The losses of other papers against loops over single numbers in float64, and what their papers say of them."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import literature
from accuracy.literature import LOSSES, Step
from torch import Tensor
from torchvision.ops import box_iou

CHANNELS, SIZES, SCALES = 4, ((6, 8), (3, 4)), (1 / 4, 1 / 8)
BOXES = (torch.tensor([[4.0, 4.0, 19.0, 15.0], [10.0, 8.0, 30.0, 22.0]]), torch.tensor([[1.0, 2.0, 9.0, 20.0]]))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def anchors() -> list[Tensor]:
    """Two a place: squares of 8 and 16 pixels, on the coarse level of 16 and 32."""
    levels = []
    for (height, width), scale in zip(SIZES, SCALES):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centre = torch.stack([x, y, x, y], -1)[:, :, None].double() / scale
        halves = torch.tensor([1.0, 2.0], dtype=torch.float64)[:, None] / scale
        levels.append(centre + torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64) * halves)
    return levels


@pytest.fixture
def step() -> Step:
    return Step(
        student=[random(2, CHANNELS, *size, seed=1).requires_grad_() for size in SIZES],
        teacher=[random(2, CHANNELS, *size, seed=2) for size in SIZES],
        scales=list(SCALES),
        boxes=[boxes.double() for boxes in BOXES],
        anchors=anchors,
        logits=random(5, 3, seed=3).requires_grad_(),
        labels=torch.tensor([0, 1, 2, 0, 1]),
        answer=lambda: random(5, 3, seed=4),
    )


def places(step: Step, image: int, level: int, x: int, y: int) -> tuple[list[float], list[float]]:
    return tuple(maps[level][image, :, y, x].tolist() for maps in (step.student, step.teacher))


def squared(step: Step, image: int, level: int, x: int, y: int) -> float:
    """The squared difference of one place, summed over channels."""
    return sum((a - b) ** 2 for a, b in zip(*places(step, image, level, x, y)))


def grid(level: int) -> list[tuple[int, int]]:
    return [(x, y) for y in range(SIZES[level][0]) for x in range(SIZES[level][1])]


def touches(box: list[float], scale: float, x: int, y: int) -> bool:
    left, top, right, bottom = box
    across = math.floor(left * scale) <= x <= math.ceil(right * scale)
    return across and math.floor(top * scale) <= y <= math.ceil(bottom * scale)


def test_imitation(step):
    total = sum(
        sum(squared(step, image, level, x, y) for image in range(2) for x, y in grid(level))
        / (2 * CHANNELS * len(grid(level)))
        for level in range(2)
    )
    assert literature.imitation(step).item() == pytest.approx(total / 2)


def test_pkd_is_one_minus_the_correlation_of_each_channel(step):
    total = 0.0
    for student, teacher in zip(step.student, step.teacher):
        for channel in range(CHANNELS):
            pair = torch.stack([student[:, channel].flatten(), teacher[:, channel].flatten()])
            count = pair.shape[1]
            # The deviations have count - 1 below the root, the mean of the squares has count.
            total += (1 - torch.corrcoef(pair)[0, 1].item()) * (count - 1) / count / CHANNELS
    assert literature.pkd(step).item() == pytest.approx(6 * total, rel=1e-4)  # its 1e-6, and float32


def test_cwd(step):
    total = 0.0
    for student, teacher in zip(step.student, step.teacher):
        for image in range(2):
            for channel in range(CHANNELS):
                p, q = (
                    [math.exp(value) for value in maps[image, channel].flatten().tolist()]
                    for maps in (teacher, student)
                )
                p, q = [a / sum(p) for a in p], [b / sum(q) for b in q]
                total += sum(a * math.log(a / b) for a, b in zip(p, q)) / (2 * CHANNELS)
    assert literature.cwd(step).item() == pytest.approx(10 * total)


def test_fgfi(step):
    total = count = 0.0
    for image, boxes in enumerate(step.boxes):
        near = set()
        for box in boxes:
            overlaps = {
                (level, x, y): box_iou(anchors()[level][y, x], box[None]).max().item()
                for level in range(2)
                for x, y in grid(level)
            }
            near |= {place for place, overlap in overlaps.items() if overlap > 0.5 * max(overlaps.values())}
        total += sum(squared(step, image, level, x, y) for level, x, y in near)
        count += len(near)
    assert 0 < count < 2 * sum(len(grid(level)) for level in range(2))
    assert literature.fgfi(step).item() == pytest.approx(0.01 * total / (2 * count))


def test_defeat(step):
    total = 0.0
    for level, scale in enumerate(SCALES):
        inside, outside = [], []
        for image in range(2):
            for x, y in grid(level):
                is_inside = any(touches(box.tolist(), scale, x, y) for box in step.boxes[image])
                (inside if is_inside else outside).append(squared(step, image, level, x, y) / CHANNELS)
        total += (3 * sum(inside) / (2 * len(inside)) + 12 * sum(outside) / (2 * len(outside))) / 2
    p, q = step.answer().softmax(1), step.logits.softmax(1)
    divergences = [sum((a * (a / b).log()).item() for a, b in zip(*rows)) for rows in zip(p, q)]
    for is_object in (True, False):
        chosen = [d for d, label in zip(divergences, step.labels.tolist()) if (label > 0) == is_object]
        total += 2 * sum(chosen) / len(chosen)
    assert literature.defeat(step).item() == pytest.approx(total)


def fgd_level(step: Step, level: int) -> float:
    """One level of FGD, whose context blocks leave their maps as they are at first."""
    student, teacher, scale = step.student[level], step.teacher[level], SCALES[level]
    total, cells = 0.0, grid(level)

    def attention(maps: Tensor, image: int) -> tuple[dict[tuple[int, int], float], list[float]]:
        size = maps[image].abs()
        at = {(x, y): math.exp(size[:, y, x].mean().item() / 0.5) for x, y in cells}
        of = [math.exp(size[c].mean().item() / 0.5) for c in range(CHANNELS)]
        return (
            {place: len(cells) * value / sum(at.values()) for place, value in at.items()},
            [CHANNELS * value / sum(of) for value in of],
        )

    for image in range(2):
        at, of = attention(teacher, image)
        own_at, own_of = attention(student, image)
        focal = {True: 0.0, False: 0.0}
        background = 0
        for x, y in cells:
            sizes = [
                (math.ceil(r * scale) + 1 - math.floor(le * scale)) * (math.ceil(b * scale) + 1 - math.floor(t * scale))
                for le, t, r, b in step.boxes[image].tolist()
                if touches([le, t, r, b], scale, x, y)
            ]
            pairs = zip(of, *places(step, image, level, x, y))
            weighted = at[x, y] * sum(c * (a - b) ** 2 for c, a, b in pairs)
            focal[bool(sizes)] += weighted / min(sizes) if sizes else weighted
            background += not sizes
        attentive = sum(abs(own_at[p] - at[p]) for p in cells) + sum(abs(a - b) for a, b in zip(own_of, of))
        relation = sum(squared(step, image, level, x, y) for x, y in cells)
        total += 5e-5 * focal[True] + 2.5e-5 * focal[False] / max(background, 1) + 5e-5 * attentive + 5e-7 * relation
    return total / 2


def test_fgd(step):
    loss = LOSSES["fgd"](CHANNELS, 2).double()
    assert loss(step).item() == pytest.approx(fgd_level(step, 0) + fgd_level(step, 1), rel=1e-5)


def test_the_context_block_adds_one_vector_to_all_places():
    block = literature.ContextBlock(4).double()
    torch.nn.init.normal_(block.change[-1].weight)
    maps = random(2, 4, 3, 5, seed=0)
    added = (block(maps) - maps).detach()
    assert added.abs().max() > 0
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added))
    weights = block.place(maps).flatten(1).softmax(1)
    context = (maps.flatten(2) * weights[:, None]).sum(2)[:, :, None, None]
    torch.testing.assert_close(added[:, :, :1, :1], block.change(context).detach())


@pytest.mark.parametrize("name", LOSSES)
def test_an_equal_student_has_no_loss_and_another_one_a_gradient(step, name):
    loss = LOSSES[name](CHANNELS, 2)
    if isinstance(loss, torch.nn.Module):
        loss.double()
    loss(step).backward()
    assert all(level.grad is not None and level.grad.any() for level in step.student)
    step.student, step.logits = step.teacher, step.answer()
    assert loss(step).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_images_without_objects_are_taken(step, name):
    step.boxes = [torch.zeros(0, 4, dtype=torch.float64)] * 2
    step.labels = torch.zeros(5, dtype=torch.int64)
    loss = LOSSES[name](CHANNELS, 2)
    if isinstance(loss, torch.nn.Module):
        loss.double()
    assert loss(step).isfinite()
