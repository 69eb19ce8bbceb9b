"""For detectors whose head answers for all of a grid: what such a head and an assigner say, as regions and answers.

Here A counts the places of the grid, those of all levels together: points, cells or anchors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .answers import best_for, rows_of
from .base import Detector, HeadOutputs, InputBatch, Regions, Sides, TeacherPass


def flatten_maps(maps: Sequence[Tensor]) -> Tensor:
    """Maps of a head, L x (N, D, H_l, W_l), as (N, A, D): place by place, level after level."""
    return torch.cat([level.flatten(2) for level in maps], dim=2).transpose(1, 2)


def level_of_place(maps: Sequence[Tensor]) -> Tensor:
    """(A,) int64: the level of each place, where each position of L x (N, D, H_l, W_l) is one."""
    sizes = torch.tensor([level.shape[-2] * level.shape[-1] for level in maps], device=maps[0].device)
    return torch.arange(len(maps), device=sizes.device).repeat_interleave(sizes)


def cells(maps: Sequence[Tensor], scales: Sequence[float]) -> tuple[tuple[int, int, float], ...]:
    """A grid of one place at the centre of each map position, for ``Regions.grid`` and ``TeacherPass.grid``.

    Args:
        maps: L x (N, D, H_l, W_l).
        scales: of each level: map pixels per student-input pixel.
    """
    return tuple((level.shape[-2], level.shape[-1], scale) for level, scale in zip(maps, scales))


def sides_of_cells(logits: Tensor, maps: Sequence[Tensor], scales: Sequence[float]) -> Sides:
    """What a head with a distribution focal loss says of its boxes' sides; rows of all images are one dimension.

    Bin n has a side n map pixels away from the centre of the cell, as YOLOv8's head and those after it have it.

    Args:
        logits: (N, A, 4, bins) of the left, top, right and bottom side.
        maps: L x (N, D, H_l, W_l), each position of which is a cell.
        scales: of each level: map pixels per student-input pixel.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    bins = torch.arange(logits.shape[3], dtype=exact, device=logits.device)
    places = []
    for level, scale in zip(maps, scales):
        rows, columns = (torch.arange(side, dtype=exact, device=logits.device) + 0.5 for side in level.shape[-2:])
        y, x = (centre.flatten() for centre in torch.meshgrid(rows, columns, indexing="ij"))
        places.append((torch.stack([-x, -y, x, y], dim=1)[:, :, None] + bins) / scale)
    return Sides(logits.flatten(0, 1), torch.cat(places).repeat(len(logits), 1, 1))


def matched_regions(
    logits: Tensor,
    boxes: Tensor,
    matched: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
    *,
    anchors: Tensor | None = None,
    quality: Tensor | None = None,
    weights: Tensor | None = None,
    levels: Tensor | None = None,
    grid: object = None,
    sides: Sides | None = None,
) -> Regions:
    """The regions that a dense student names: the places to which its own assigner has given an object.

    Args:
        logits: (N, A, K) or (N, A, K + 1), the head's.
        boxes: (N, A, 4), the head's: xyxy in student-input pixels, or deltas, as its settings say.
        matched: (N, A) bool, which places have an object.
        labels: (N, A) int64; what stands elsewhere carries no meaning, nor does it in the next four.
        gt_boxes: (N, A, 4) xyxy of the object, in student-input pixels.
        anchors: (N, A, 4) xyxy, of a family whose places are boxes. Without them a region is its object.
        quality: (N, A) in [0, 1], what else the head thinks of its box.
        weights: (N, A), how much a region counts.
        levels: (A,) int64, see :func:`level_of_place`.
        grid: what the places are counted in; see :class:`Regions`.
        sides: of N x A rows, image after image.
    """
    image, rows = matched.nonzero(as_tuple=True)
    counts = matched.sum(1).tolist()
    exact = torch.promote_types(gt_boxes.dtype, torch.float32)
    places = (gt_boxes if anchors is None else anchors)[image, rows].to(exact)
    return Regions(
        proposals=list(places.split(counts)),
        labels=labels[image, rows],
        gt_boxes=gt_boxes[image, rows].to(exact),
        head=HeadOutputs(
            logits[image, rows],
            boxes[image, rows],
            quality=None if quality is None else quality[image, rows],
            sides=None if sides is None else sides[image * matched.shape[1] + rows],
        ),
        levels=None if levels is None else levels[rows],
        weights=None if weights is None else weights[image, rows],
        rows=rows,
        grid=grid,
    )


class DenseDetector(Detector):
    """A family whose ``teacher_pass`` runs the head on all places and puts what it says into ``TeacherPass.state``.

    That is a :class:`HeadOutputs` of N x A rows, image after image, its boxes (N x A, 4) xyxy in student-input pixels.
    """

    def answers(self, teacher_pass: TeacherPass, regions: Regions, classes: Tensor) -> HeadOutputs:
        """What it says of the same places where both grids are equal, else its best for each region's object."""
        if regions.rows is not None and regions.grid == teacher_pass.grid:
            return rows_of(teacher_pass.state, regions)
        return best_for(teacher_pass.state, regions, classes, self.head)


def plain_batch(images: Tensor) -> InputBatch:
    """Images (N, 3, H, W) in [0, 1], all of them as large, that a model takes as they are."""
    height, width = images.shape[-2:]
    return InputBatch(images, [(height, width)] * len(images), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def resized_batch(
    images: Sequence[Tensor],
    inputs: InputBatch,
    ratio: float,
    dtype: torch.dtype,
    *,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    multiple: int = 32,
) -> InputBatch:
    """A teacher's batch: the student's own where it would be the same, else one of the images at another size.

    Args:
        images: N x (3, H, W) in [0, 1].
        inputs: the student's batch.
        ratio: input pixels of the teacher per student-input pixel.
        dtype: of the teacher.
        mean, std: of the teacher's normalisation, one value a channel.
        multiple: the padded sides are multiples of it.
    """
    mean, std = tuple(mean), tuple(std)
    padded = all(side % multiple == 0 for side in inputs.tensor.shape[-2:])
    if ratio == 1 and padded and (mean, std) == (inputs.mean, inputs.std):
        return InputBatch(inputs.tensor.to(dtype), inputs.sizes, mean, std)
    # The shape follows from the student's padded batch, so that equal strides make equal grids.
    height, width = (-(-round(side * ratio) // multiple) * multiple for side in inputs.tensor.shape[-2:])
    sizes = [(round(of_image[0] * ratio), round(of_image[1] * ratio)) for of_image in inputs.sizes]
    tensor = inputs.tensor.new_zeros((len(images), 3, height, width), dtype=dtype)
    shift, factor = (inputs.tensor.new_tensor(values)[:, None, None] for values in (mean, std))
    for row, image, size in zip(tensor, images, sizes):
        resized = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
        row[:, : size[0], : size[1]] = (resized - shift) / factor
    return InputBatch(tensor, sizes, mean, std)
