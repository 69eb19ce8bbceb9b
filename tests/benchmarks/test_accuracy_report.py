"""The report: means, intervals and pairing by seed, held against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accuracy import report


def write(folder: Path, data: str, method: str, seed: int, ap: float, **more: Any) -> None:
    result = {
        "data": data,
        "pair": "pretrained",
        "method": method,
        "seed": seed,
        "factor": 1.0,
        "AP": ap,
        "seconds": 20.0,
        "cpu_seconds": 10.0 if method == "alone" else 15.0,
        "curve": [{"epoch": 1, "AP": ap / 2, "cpu_seconds": 5.0}, {"epoch": 2, "AP": ap, "cpu_seconds": 10.0}],
        "history": [{"loss_box": 1.0}],
        "pulls": {},
        "factors": {},
        "library": "abc",
        "versions": {"torch": "2"},
        **more,
    }
    path = folder / data / "pretrained" / f"{method} x{result['factor']:g}" / f"{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """The cells of the first table below a heading, by their first."""
    lines = text[text.index(heading) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|---")) + 1
    found = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        name, *cells = line.strip("| ").split(" | ")
        found[name] = [cell.strip() for cell in cells]
    return found


def test_the_interval_is_that_of_student():
    assert report.interval([1.0]) is None
    assert report.interval([1.0, 3.0]) == pytest.approx(12.71 * 2**0.5 / 2**0.5)
    assert report.interval([1.0, 2.0, 3.0]) == pytest.approx(4.30 / 3**0.5)


def test_gains_are_paired_by_seed():
    assert report.gains({0: 11.0, 2: 15.0, 3: 1.0}, {0: 10.0, 1: 99.0, 2: 12.0}) == [1.0, 3.0]


def test_the_table_of_a_place(tmp_path):
    for seed, (alone, ours, rival) in enumerate([(10, 12, 9), (20, 23, 20), (30, 34, 31)]):
        write(tmp_path, "bccd", "alone", seed, alone)
        write(tmp_path, "bccd", "ours", seed, ours)
        write(tmp_path, "bccd", "pkd", seed, rival)
    write(tmp_path, "bccd", "pkd", 0, 13.0, factor=4.0)
    write(tmp_path, "bccd", "teacher", 0, 40.0)
    table = rows(report.write_report(tmp_path), "### bccd, pretrained")
    assert list(table) == ["teacher", "alone", "ours", "pkd x4", "pkd"]
    assert table["ours"] == ["3", "23.0 ± 27.3", "+3.0 ± 2.5", "1.50"]
    assert table["pkd x4"] == ["1", "13.0", "+3.0", "1.50"]
    assert table["pkd"][2] == "+0.0 ± 2.5"
    assert (tmp_path / "gains.png").exists()
    assert (tmp_path / "time.png").exists()


def test_means_are_over_the_places_of_a_method_beside_tardkd_there(tmp_path):
    for data, gain in (("bccd", 1.0), ("cards", 3.0), ("deeppcb", 8.0)):
        write(tmp_path, data, "alone", 0, 10.0)
        write(tmp_path, data, "tardkd", 0, 10.0 + gain)
    write(tmp_path, "bccd", "pkd", 0, 12.0)
    write(tmp_path, "cards", "pkd", 0, 9.0)
    write(tmp_path, "cards", "cwd", 0, 9.0)
    assert rows(report.write_report(tmp_path), "## Validation") == {
        "tardkd": ["3", "+4.0", "+1.0", "+4.0"],
        "pkd": ["2", "+0.5", "-1.0", "+2.0"],
    }


def test_the_test_split_comes_once_it_was_looked_at(tmp_path):
    write(tmp_path, "bccd", "alone", 0, 10.0)
    write(tmp_path, "bccd", "ours", 0, 12.0)
    assert "## Test" not in report.write_report(tmp_path)
    write(tmp_path, "bccd", "alone", 0, 10.0, test={"AP": 8.0})
    write(tmp_path, "bccd", "ours", 0, 12.0, test={"AP": 9.5})
    assert rows(report.write_report(tmp_path), "## Test")["ours"] == ["1", "9.5", "+1.5", "1.50"]


def test_a_method_that_loses_is_in_the_table_too(tmp_path):
    write(tmp_path, "bccd", "alone", 0, 10.0)
    write(tmp_path, "bccd", "ours", 0, 7.0)
    assert rows(report.write_report(tmp_path), "### bccd")["ours"][2] == "-3.0"


def test_gates_and_pulls_of_the_first_seed(tmp_path):
    first = dict.fromkeys(report.STATS, 0.25) | {"loss_box": 1.0}
    last = dict.fromkeys(report.STATS, 0.75) | {"loss_box": 0.5}
    more = {"history": [first, last], "pulls": {"feature": 12.0}, "factors": {"distill_feature": 0.025}}
    write(tmp_path, "bccd", "alone", 0, 10.0)
    write(tmp_path, "bccd", "ours", 0, 12.0, **more)
    write(tmp_path, "bccd", "ours", 1, 12.0, **more)
    text = report.write_report(tmp_path)
    assert rows(text, "## Gates") == {"bccd, pretrained": ["ours", *["0.25 to 0.75"] * len(report.STATS)]}
    assert rows(text, "## Balance") == {"bccd, pretrained": ["ours", "feature", "12", "0.025"]}


def test_a_folder_without_results_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results"):
        report.write_report(tmp_path)
