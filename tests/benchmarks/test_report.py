"""The report, made of a small recorded run (``results.json``, of tiny inputs on a CPU: its times mean nothing)."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import report

RECORDED = Path(__file__).parent / "results.json"


@pytest.fixture
def results() -> dict:
    return json.loads(RECORDED.read_text())


def of(results: dict, **wanted: str) -> list[dict]:
    """The benchmarks whose ``extra_info`` has these values."""
    return [b for b in results["benchmarks"] if wanted.items() <= b["extra_info"].items()]


def target(results: dict, folder: Path, name: str) -> list[str]:
    """The cells of that line in the table of what is wanted."""
    lines = report.write_report(results, folder).splitlines()
    (found,) = [line for line in lines if line.startswith(f"| {name} |")]
    return found.strip("| ").split(" | ")[1:]


def test_every_part_is_there(results, tmp_path):
    text = report.write_report(results, tmp_path)
    assert (tmp_path / "report.md").read_text() == text
    parts = ("## What is wanted", "## Ratios", "## Training steps", "## Roofline", "## Growth")
    for part in (*parts, results["commit_info"]["id"]):
        assert part in text
    assert "## Host and device" not in text
    for name in ("ratios.png", "roofline.png", "growth.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in text


def test_tiny_inputs_are_said_to_be_tiny(results, tmp_path):
    assert "the times mean nothing" in report.write_report(results, tmp_path)
    for one in results["benchmarks"]:
        one["extra_info"]["quick"] = False
    assert "the times mean nothing" not in report.write_report(results, tmp_path)


def test_ratio_is_of_the_rival_to_tardkd(results, tmp_path):
    (one,) = of(results, op="pooled_distill_loss", side="eager", gate="all")
    one["stats"] |= {"median": 0.05, "iqr": 0.01}
    one["extra_info"] |= {"our_seconds": 0.002, "our_spread": 0.1}
    lines = report.write_report(results, tmp_path).splitlines()
    rows = [line for line in lines if line.startswith("| cpu float32 NCHW | all | eager | 2 | 5% | 50 | 10% | 25 |")]
    assert len(rows) == 1


@pytest.mark.parametrize("seconds, cells", [(0.05, ["≥ 5x", "25.0x", "yes"]), (0.009, ["≥ 5x", "4.5x", "**no**"])])
def test_what_is_wanted_of_a_ratio(results, tmp_path, seconds, cells):
    (one,) = of(results, op="pooled_distill_loss", side="eager", gate="all")
    one["stats"]["median"], one["extra_info"]["our_seconds"] = seconds, 0.002
    assert target(results, tmp_path, "`pooled_distill_loss` / eager, all open") == cells


@pytest.mark.parametrize("remembered, cells", [(1.02, ["≤ 3 %", "2.0%", "yes"]), (1.04, ["≤ 3 %", "4.0%", "**no**"])])
def test_what_is_wanted_of_a_training_step(results, tmp_path, remembered, cells):
    (one,) = [b["extra_info"] for b in results["benchmarks"] if "training_step" in b["extra_info"]]
    # A slow round is slow for all: what counts is the ratio within it.
    rounds = {"student alone": (1.0, 4.0, 2.0), "tardkd, teacher remembered": [remembered * s for s in (1.0, 4.0, 2.0)]}
    one["seconds_of"] |= rounds | {"tardkd": (1.25, 8.0, 2.4)}
    assert target(results, tmp_path, "distillation over the student's step, teacher apart") == cells
    assert target(results, tmp_path, "whole step / the student's") == ["stated", "1.25", "yes"]
    assert "| tardkd | 2400 | 1.250 | 1.225 to 1.625 |" in (tmp_path / "report.md").read_text()


def test_what_is_wanted_of_memory(results, tmp_path):
    flagship = of(results, op="region_distill_loss", side="tardkd", gate="either")
    (one,) = [b for b in flagship if "curve" not in b["extra_info"]]
    one["extra_info"] |= {"gradient_bytes": 1000, "peak_extra_bytes": 1030}
    name = "flagship, either: peak extra memory / gradients"
    assert target(results, tmp_path, name) == ["≤ 1.02", "1.030", "**no**"]


def test_only_the_same_work_is_compared(results):
    rows = report.read(results)
    for ours, rival in report.pairs(rows):
        assert (ours["side"], report.place(ours)) == ("tardkd", report.place(rival)) and rival["side"] != "tardkd"
    without = [row for row in rows if row["side"] != "tardkd"]
    assert report.pairs(rows) and report.pairs(without) == []


def test_time_on_the_device_comes_first(results, tmp_path):
    """As of a GPU, where it is known."""
    on_gpu = copy.deepcopy(of(results, op="pooled_distill_loss", gate="all"))
    for one in on_gpu:
        measured = dict(device_seconds=0.001, our_seconds=0.001, host_seconds=0.003, launches=4, synchronisations=0)
        one["extra_info"] |= {"case": "cuda float32 NCHW", "our_spread": 0.0, **measured}
        one["stats"]["median"] = 0.004
    results["benchmarks"] += on_gpu
    text = report.write_report(results, tmp_path)
    assert "| `pooled_distill_loss` | cuda float32 NCHW | all | tardkd | 1 | 3 | 4 | 4 | 0 |" in text
    assert "| cuda float32 NCHW | all | eager | 1 | 0% | 1 | 0% | 1 |" in text


def test_a_point_that_is_missing_leaves_its_cell_empty(results, tmp_path):
    point = next(b for b in results["benchmarks"] if "curve" in b["extra_info"])
    results["benchmarks"].remove(point)
    value = point["extra_info"]["value"]
    rows = [line for line in report.write_report(results, tmp_path).splitlines() if line.startswith(f"| {value} |")]
    assert any(" |  |" in row for row in rows)


def test_parts_without_results_are_left_out(results, tmp_path):
    for one in results["benchmarks"]:
        one["extra_info"].pop("floor_seconds", None)
    left_out = ("curve", "training_step")
    results["benchmarks"] = [b for b in results["benchmarks"] if not any(key in b["extra_info"] for key in left_out)]
    text = report.write_report(results, tmp_path)
    assert not any(part in text for part in ("## Roofline", "## Growth", "## Training steps"))
    assert not (tmp_path / "roofline.png").exists() and not (tmp_path / "growth.png").exists()


def test_nothing_to_report_is_an_error(results, tmp_path):
    results["benchmarks"] = []
    with pytest.raises(SystemExit, match="no result"):
        report.write_report(results, tmp_path)


def test_command_line(tmp_path):
    command = [sys.executable, report.__file__, str(RECORDED), "--out", str(tmp_path / "new" / "folder")]
    subprocess.run(command, check=True)
    assert (tmp_path / "new" / "folder" / "report.md").exists()
