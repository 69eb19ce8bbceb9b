"""Outputs of unlike heads brought into the student's terms, against definitions written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder

from tardkd.detectors.base import HeadOutputs, HeadSettings, Regions, Sides
from tardkd.distill.classes import ClassMap
from tardkd.distill.conventions import (
    common_coding,
    decode,
    in_students_bins,
    in_students_terms,
    scores,
    to_sigmoid,
    to_softmax,
)

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
COLUMNS = pytest.mark.parametrize("background", [0, 3], ids=["first", "last"])


def head(activation: str = "softmax", background: str = "first", coding: str = "deltas", **settings) -> HeadSettings:
    return HeadSettings(background, activation, WEIGHTS, settings.pop("widths", None), coding, **settings)


def random_boxes(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner, size = 40 * torch.rand(2, rows, 2, generator=generator)
    return torch.cat([corner, corner + size + 4], dim=1)


def regions_of(labels: list[int], logits: Tensor, boxes: Tensor) -> Regions:
    rows = len(labels)
    return Regions([random_boxes(rows)], torch.tensor(labels), random_boxes(rows, 1), HeadOutputs(logits, boxes))


# --- logits -----------------------------------------------------------------------------------------------------------


@COLUMNS
def test_softmax_becomes_the_log_odds_of_each_class(background: int) -> None:
    logits = 3 * torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = to_sigmoid(logits, background)
    probabilities = logits.softmax(1)
    classes = [column for column in range(4) if column != background]
    assert found.shape == (5, 3)
    for row, (place, column) in itertools.product(range(5), enumerate(classes)):
        p = probabilities[row, column].item()
        assert found[row, place].sigmoid().item() == pytest.approx(p, rel=1e-12)


def test_a_class_that_is_certain_has_finite_log_odds() -> None:
    found = to_sigmoid(torch.tensor([[0.0, 300.0, -300.0]]), 0)
    assert found.isfinite().all() and found[0, 0] > 20 and found[0, 1] < -20


@COLUMNS
def test_sigmoid_becomes_the_distribution_of_one_event_or_none(background: int) -> None:
    """Counted over all 2^K outcomes of K independent events: only k, or none, given that at most one happens."""
    logits = 2 * torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = to_softmax(logits, background).softmax(1)
    for row, p in enumerate(logits.sigmoid().tolist()):
        joint = {}
        for outcome in itertools.product([0, 1], repeat=3):
            joint[outcome] = 1.0
            for happens, p_k in zip(outcome, p):
                joint[outcome] *= p_k if happens else 1 - p_k
        single = [joint[tuple(int(k == place) for k in range(3))] for place in range(3)]
        expected = [value / (sum(single) + joint[0, 0, 0]) for value in single]
        expected.insert(background, joint[0, 0, 0] / (sum(single) + joint[0, 0, 0]))
        assert found[row].tolist() == pytest.approx(expected, rel=1e-12)


def test_of_one_class_each_is_the_others_inverse() -> None:
    logits = torch.linspace(-8, 8, 9, dtype=torch.float64)[:, None]
    for background in (0, 1):
        torch.testing.assert_close(to_sigmoid(to_softmax(logits, background), background), logits)


def test_no_regions_have_no_logits() -> None:
    assert to_sigmoid(torch.zeros(0, 4), 0).shape == (0, 3) and to_softmax(torch.zeros(0, 3), 0).shape == (0, 4)


# --- boxes ------------------------------------------------------------------------------------------------------------


def test_deltas_are_decoded_as_torchvisions_coder_does() -> None:
    deltas = 2 * torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    deltas[0, 2:] = 100.0  # beyond the clamp
    boxes = random_boxes(6)
    torch.testing.assert_close(decode(deltas, boxes, WEIGHTS), BoxCoder(WEIGHTS).decode_single(deltas, boxes))
    assert decode(deltas.bfloat16(), boxes, WEIGHTS).dtype == torch.float32


@pytest.mark.parametrize("background, labels", [("first", [1, 3, 2]), ("last", [0, 2, 1])])
@pytest.mark.parametrize("blocks", [1, 3, 4], ids=["agnostic", "classes", "with background"])
def test_the_box_of_the_regions_class_is_decoded(background: str, labels: list[int], blocks: int) -> None:
    deltas = torch.randn(3, 4 * blocks, generator=torch.Generator().manual_seed(3), requires_grad=True)
    given = HeadOutputs(torch.zeros(3, 4), deltas)
    regions = regions_of(labels, given.logits, deltas)
    softmax = head(background=background)
    found = in_students_terms(given, softmax, softmax, regions, "boxes")
    places = [0, 2, 1]  # of the classes
    blocks_of = {1: [0, 0, 0], 3: places, 4: [1 + p for p in places] if background == "first" else places}[blocks]
    own = torch.stack([deltas[row, 4 * block : 4 * block + 4] for row, block in enumerate(blocks_of)])
    torch.testing.assert_close(found.boxes, BoxCoder(WEIGHTS).decode_single(own, regions.boxes))
    found.boxes.square().sum().backward()
    assert deltas.grad is not None and (deltas.grad != 0).sum() == 12  # a student's deltas learn, those of its class


def test_background_regions_have_some_box_and_no_error() -> None:
    given = HeadOutputs(torch.zeros(2, 4), torch.zeros(2, 12))
    for background, label in (("first", 0), ("last", 3)):
        convention = head(background=background)
        regions = regions_of([label, label], given.logits, given.boxes)
        assert in_students_terms(given, convention, convention, regions, "boxes").boxes.isfinite().all()


def test_what_is_in_the_students_terms_is_left_alone() -> None:
    given = HeadOutputs(torch.zeros(2, 4), torch.zeros(2, 16), torch.zeros(2, 1, 1, 1))
    regions = regions_of([1, 2], given.logits, given.boxes)
    assert common_coding(head(), head()) == "deltas"
    found = in_students_terms(given, head(), head(), regions, "deltas")
    assert found.logits is given.logits and found.boxes is given.boxes and found.pooled is given.pooled


@pytest.mark.parametrize("student, teacher", [("deltas", "boxes"), ("boxes", "deltas"), ("boxes", "boxes")])
def test_boxes_are_compared_where_one_side_has_no_deltas(student: str, teacher: str) -> None:
    assert common_coding(head(coding=student), head(coding=teacher)) == "boxes"


# --- classes ----------------------------------------------------------------------------------------------------------


def test_heads_of_unlike_activations_have_the_same_classes() -> None:
    softmax, sigmoid = head(widths=(4, 16)), head("sigmoid", coding="boxes", widths=(3, 4))
    ClassMap().check_widths(softmax, sigmoid)
    ClassMap().check_widths(sigmoid, softmax)
    more = head("sigmoid", coding="boxes", widths=(5, 4))
    with pytest.raises(ValueError, match=r"student's head has 4 logits .*teacher's has 6"):
        ClassMap().check_widths(softmax, more)


@pytest.mark.parametrize("background, labels", [("first", [2, 0, 1]), ("last", [1, 2, 0])])
def test_the_teachers_count_of_its_classes(background: str, labels: list[int]) -> None:
    named = ClassMap(("a", "b", "c"), ("x", "c", "y", "a"), ((0, 3), (2, 1)))
    convention = head(background=background)
    regions = regions_of(labels, torch.zeros(3, 3), torch.zeros(3, 4))  # pairs a, c and the background
    assert named.teacher_places(regions, convention).tolist() == [1, -1, 3]
    assert ClassMap().teacher_places(regions, convention).tolist() == [1, -1, 0]


# --- distributions ----------------------------------------------------------------------------------------------------


def random_sides(rows: int, bins: int, seed: int, low: float = 0.0, high: float = 30.0) -> Sides:
    """Bins at random places between two."""
    generator = torch.Generator().manual_seed(seed)
    places = low + (high - low) * torch.rand(rows, 4, bins, generator=generator)
    return Sides(3 * torch.randn(rows, 4, bins, generator=generator), places.sort(dim=2).values)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_bins_in_the_same_places_stay_as_they_are(temperature: float) -> None:
    teacher = random_sides(6, 9, 0)
    found = in_students_bins(teacher, Sides(torch.zeros(6, 4, 9), teacher.places), temperature)
    torch.testing.assert_close((found / temperature).softmax(2), (teacher.logits / temperature).softmax(2))


def test_a_bin_is_shared_between_the_two_around_it() -> None:
    """Bin by bin, in plain Python; what is beyond the student's bins goes to the outermost."""
    student, teacher = random_sides(3, 5, 1, 5.0, 25.0), random_sides(3, 7, 2)
    found = in_students_bins(teacher, student, 1.0).softmax(2)
    for row, side in itertools.product(range(3), range(4)):
        places, expected = student.places[row, side].tolist(), [0.0] * 5
        for p, x in zip(teacher.logits[row, side].softmax(0).tolist(), teacher.places[row, side].tolist()):
            x = min(max(x, places[0]), places[-1])
            left = max(n for n in range(4) if n == 0 or places[n] <= x)
            share = (x - places[left]) / (places[left + 1] - places[left])
            expected[left] += p * (1 - share)
            expected[left + 1] += p * share
        assert found[row, side].tolist() == pytest.approx(expected, abs=1e-6)


def test_bins_that_all_stand_in_one_place_give_finite_logits() -> None:
    """Those of a first box without extent."""
    student = Sides(torch.zeros(2, 4, 5), torch.full((2, 4, 5), 3.0))
    assert in_students_bins(random_sides(2, 5, 0), student, 1.0).isfinite().all()


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_are_the_root_of_probability_times_quality() -> None:
    logits, quality = torch.randn(2, 3, generator=torch.Generator().manual_seed(4)), torch.tensor([0.5, 0.9])
    given = HeadOutputs(logits, torch.zeros(2, 4), quality=quality)
    found = scores(given, torch.tensor([3, 1]), head("sigmoid"))
    expected = [(logits[0, 2].sigmoid() * 0.5).sqrt().item(), (logits[1, 0].sigmoid() * 0.9).sqrt().item()]
    assert found.tolist() == pytest.approx(expected)
    found = scores(given, torch.tensor([2, 0]), head())
    expected = [(logits[0].softmax(0)[2] * 0.5).sqrt().item(), (logits[1].softmax(0)[0] * 0.9).sqrt().item()]
    assert found.tolist() == pytest.approx(expected)
