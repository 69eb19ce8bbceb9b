"""Helpers for heads that answer for all of a grid, against the same written place by place."""

from __future__ import annotations

import torch
from torch import Tensor

from tardkd.detectors import dense
from tardkd.detectors.base import InputBatch, Sides

SHAPES = [(2, 3), (1, 2)]


def maps(width: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, width, *shape, generator=generator) for shape in SHAPES]


def test_maps_are_flattened_place_by_place():
    levels = maps()
    flat, of_place = dense.flatten_maps(levels), dense.level_of_place(levels)
    expected = [
        level[:, :, row, column]
        for level, (height, width) in zip(levels, SHAPES)
        for row in range(height)
        for column in range(width)
    ]
    assert torch.equal(flat, torch.stack(expected, dim=1))
    assert of_place.tolist() == [0] * 6 + [1] * 2


def test_grids_are_equal_where_their_places_are():
    """A map of twice the stride on an input of twice the size has the same places; of the same stride it has not."""
    grid = dense.cells(maps(), [1 / 8, 1 / 16])
    assert grid == dense.cells(maps(7), [2 / 16, 2 / 32])
    assert grid != dense.cells(maps(), [1 / 16, 1 / 32])
    assert grid != dense.cells([level[..., :1] for level in maps()], [1 / 8, 1 / 16])


def test_regions_are_the_matched_places():
    generator = torch.Generator().manual_seed(1)
    logits, boxes, gt_boxes, anchors = (torch.rand(2, 8, width, generator=generator) for width in (3, 4, 4, 4))
    weights, quality = torch.rand(2, 2, 8, generator=generator)
    labels = torch.randint(3, (2, 8), generator=generator)
    matched = torch.zeros(2, 8, dtype=torch.bool)
    places = [(0, 1), (0, 6), (1, 7)]
    for place in places:
        matched[place] = True
    sides = Sides(torch.rand(16, 4, 5, generator=generator), torch.rand(16, 4, 5, generator=generator))
    more = dict(sides=sides, weights=weights, quality=quality, levels=dense.level_of_place(maps()), grid="a grid")
    for given in (anchors, None):
        regions = dense.matched_regions(logits, boxes, matched, labels, gt_boxes, anchors=given, **more)
        assert regions.counts == [2, 1] and regions.grid == "a grid"
        assert regions.rows.tolist() == [1, 6, 7] and regions.levels.tolist() == [0, 1, 1]
        found = [regions.boxes, regions.labels, regions.gt_boxes, regions.head.logits, regions.head.boxes]
        found += [regions.weights, regions.head.quality]
        source = [gt_boxes if given is None else given, labels, gt_boxes, logits, boxes, weights, quality]
        for values, everything in zip(found, source):
            assert torch.equal(values, torch.stack([everything[place] for place in places]))
        for values, everything in zip(vars(regions.head.sides).values(), vars(sides).values()):
            assert torch.equal(values, torch.stack([everything[8 * image + row] for image, row in places]))


def test_bins_stand_a_map_pixel_apart_from_the_cell_outwards():
    logits = torch.rand(2, 8, 4, 3)
    sides = dense.sides_of_cells(logits, maps(), [1 / 8, 1 / 20])
    assert torch.equal(sides.logits, torch.cat([*logits]))
    cells = [(8 * column + 4, 8 * row + 4, 8) for row in range(2) for column in range(3)]
    cells += [(20 * column + 10, 10, 20) for column in range(2)]
    expected = [[[edge + n * stride for n in range(3)] for edge in (-x, -y, x, y)] for x, y, stride in cells]
    torch.testing.assert_close(sides.places, torch.tensor(expected * 2, dtype=torch.float32))


def test_no_match_is_no_region():
    nothing = torch.zeros(2, 8, dtype=torch.bool)
    logits = torch.zeros(2, 8, 3, requires_grad=True)
    regions = dense.matched_regions(logits, torch.zeros(2, 8, 4), nothing, nothing.long(), torch.zeros(2, 8, 4))
    assert regions.counts == [0, 0] and regions.head.logits.shape == (0, 3) and regions.head.logits.requires_grad


def test_a_students_batch_is_taken_where_it_is_the_teachers():
    images = torch.rand(2, 3, 64, 96)
    inputs = dense.plain_batch(images)
    assert dense.resized_batch(list(images), inputs, 1.0, images.dtype).tensor is images
    other = dense.resized_batch(list(images), inputs, 1.0, images.dtype, mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.testing.assert_close(other.tensor, (images - 0.5) / 0.25)
    assert dense.resized_batch(list(images), inputs, 1.0, images.dtype, multiple=64).tensor.shape[-2:] == (64, 128)


def test_images_are_resized_inside_the_padding():
    images = [torch.full((3, 20, 30), 0.25), torch.full((3, 32, 16), 0.5)]
    inputs = InputBatch(torch.zeros(2, 3, 32, 32), [(20, 30), (32, 16)], (0.0,) * 3, (1.0,) * 3)
    batch = dense.resized_batch(images, inputs, 2.0, torch.float64)
    assert batch.tensor.dtype == torch.float64 and batch.tensor.shape == (2, 3, 64, 64)
    assert batch.sizes == [(40, 60), (64, 32)]
    for value, (height, width), image in zip((0.25, 0.5), batch.sizes, batch.tensor):
        assert (image[:, :height, :width] == value).all() and image.sum() == 3 * height * width * value
