from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tardkd.train.logs import RunLog, Table

METRICS = {"AP": 12.34, "AP50": 30.0, "AP75": 5.0, "APs": 1.0, "APm": 2.0, "APl": None, "per_class": {"cat": 1.5}}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def run_log(folder, resume_step=None, *, terminal=False):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    return RunLog(folder, epochs=2, steps_per_epoch=3, resume_step=resume_step, log_every=2, console=console,
                  label="student")


def test_tables_lines_and_scalars(tmp_path):
    with run_log(tmp_path) as log:
        for step in (1, 2, 3):
            log.step(1, step, {"lr": 0.1, "loss": 2.0 / step, "distill_feature": 0.5}, images=4, seconds=0.5)
        log.evaluation(1, 3, METRICS, best=True)
    assert rows(tmp_path / "train.csv") == [
        ["epoch", "step", "lr", "loss", "distill_feature", "seconds"],
        ["1", "1", "0.1", "2", "0.5", "0.5"], ["1", "2", "0.1", "1", "0.5", "0.5"],
        ["1", "3", "0.1", "0.666667", "0.5", "0.5"]]
    assert rows(tmp_path / "eval.csv") == [
        ["epoch", "step", "AP", "AP50", "AP75", "APs", "APm", "APl", "AP/cat"],
        ["1", "3", "12.34", "30", "5", "1", "2", "", "1.5"]]
    assert log.console.file.getvalue().splitlines() == [
        "student epoch 1/2 step 2/6 8.0 img/s loss 1 d.feat 0.5",
        "student epoch 1/2 AP 12.3 AP50 30.0 AP75 5.0 APs 1.0 APm 2.0 APl - (best)"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.0), (3, 0.667)]
    assert [e.value for e in events.Scalars("eval/AP/cat")] == [1.5]


def test_a_terminal_gets_a_bar_in_place_of_lines(tmp_path):
    with run_log(tmp_path, terminal=True) as log:
        for step in (1, 2):
            log.step(1, step, {"loss": 2.0}, images=4, seconds=0.5)
        log._progress.refresh()
        shown = log.console.file.getvalue()
    assert "2/6" in shown and "8.0 img/s" in shown and "loss 2" in shown
    assert "step 2/6" not in shown


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    with run_log(tmp_path) as log:
        for step in range(1, 5):
            log.step(1, step, {"loss": float(step)}, images=1, seconds=1.0)
    with open(tmp_path / "train.csv", "a") as file:
        file.write("2,1")  # a crash in the middle of a row, whose step was 12
    with run_log(tmp_path, resume_step=3) as log:
        log.step(2, 4, {"loss": 40.0}, images=1, seconds=1.0)
    table = rows(tmp_path / "train.csv")
    assert table[0] == ["epoch", "step", "loss", "seconds"]
    assert [row[1:3] for row in table[1:]] == [["1", "1"], ["2", "2"], ["3", "3"], ["4", "40"]]


def test_a_missing_value_is_an_empty_cell_and_a_new_one_an_error(tmp_path):
    table = Table(tmp_path / "t.csv", resume_step=None)
    table.write({"step": 1, "loss": 1.0, "gate": 0.5})
    table.write({"step": 2, "loss": 1.0})
    with pytest.raises(ValueError, match="no column for extra; it has step, loss, gate"):
        table.write({"step": 3, "loss": 1.0, "gate": 0.5, "extra": 1.0})
    table.close()
    assert rows(tmp_path / "t.csv")[2] == ["2", "1", ""]
