"""The overhead of a distilled step: what is subtracted from what, and that the fused op is what runs."""

from __future__ import annotations

import pytest
from families import Pair, half_range, overheads, report, share

RESULT = {
    "student": "fcos",
    "teacher": "retinanet",
    "regions": 12,
    "ops": {"region_distill": 2},
    "seconds": {"alone": [0.5, 0.6, 0.5], "teacher": [0.2, 0.2, 0.3], "distilled": [0.76, 0.9, 0.92]},
}


def test_the_overhead_is_what_neither_model_takes_alone():
    assert overheads(RESULT) == pytest.approx([0.06, 0.1, 0.12])
    assert share(RESULT) == pytest.approx(0.1 / 0.5)


def test_half_the_interquartile_range():
    assert half_range([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1.0)


def test_the_report():
    other = {**RESULT, "student": "ssdlite", "teacher": "fcos"}
    content = {"about": "Small ones.", "rounds": 3, "circumstances": {"torch": "1"}, "pairs": [RESULT, other]}
    text = report(content)
    assert "| student | retinanet | fcos |" in text
    assert "| fcos | +20% |  |" in text and "| ssdlite |  | +20% |" in text
    assert "| fcos | retinanet | 12 | 500 | 200 | 900 | 100 ± 15 | 2 x region_distill |" in text


def test_a_pair_is_measured():
    pair = Pair("ssdlite", "fcos")
    before = [weight.clone() for weight in pair.student.parameters()]
    result = pair.measure(rounds=2)
    assert result["ops"] == {"region_distill": 2}  # forward and backward, no more
    assert result["regions"] > 0
    assert all(len(times) == 2 and min(times) > 0 for times in result["seconds"].values())
    assert all((weight == old).all() for weight, old in zip(pair.student.parameters(), before))
