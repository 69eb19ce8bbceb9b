from __future__ import annotations

import csv
import io
import re

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tardkd.train import display
from tardkd.train.display import place
from tardkd.train.logs import RunLog, Table

METRICS = {"AP": 12.34, "AP50": 30.0, "AP75": 5.0, "APs": 1.0, "APm": 2.0, "APl": None, "per_class": {"cat": 1.5}}


@pytest.fixture(autouse=True)
def same_memory(monkeypatch):
    monkeypatch.setattr(display, "memory_peak", lambda: "peak 0.25 GiB")


def rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def run_log(folder, resumed=None, *, terminal=False, width=200):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width)
    return RunLog(folder, epochs=2, steps_per_epoch=3, resumed=resumed, log_every=2, console=console, label="student")


def test_tables_lines_and_scalars(tmp_path):
    with run_log(tmp_path) as log:
        for step in (1, 2, 3):
            log.step(1, step, {"lr": 0.1, "loss": 2.0 / step, "distill_feature": 0.5}, images=4, seconds=0.5)
        log.evaluation(1, 3, METRICS, best=True)
    assert rows(tmp_path / "train.csv") == [
        ["epoch", "step", "lr", "loss", "distill_feature", "seconds"],
        ["1", "1", "0.1", "2", "0.5", "0.5"],
        ["1", "2", "0.1", "1", "0.5", "0.5"],
        ["1", "3", "0.1", "0.666667", "0.5", "0.5"],
    ]
    assert rows(tmp_path / "eval.csv") == [
        ["epoch", "step", "AP", "AP50", "AP75", "APs", "APm", "APl", "AP/cat"],
        ["1", "3", "12.34", "30", "5", "1", "2", "", "1.5"],
    ]
    assert log.console.file.getvalue().splitlines() == [
        (
            "student epoch 1/2 step 2/6  2.0 steps/s  8.0 images/s  0:00:02 left  peak 0.25 GiB  loss: total 1  "
            "distill: feature 0.5"
        ),
        "student epoch 1/2 AP 12.3 AP50 30.0 AP75 5.0 APs 1.0 APm 2.0 APl - (best)",
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("loss/total")] == [(1, 2.0), (2, 1.0), (3, 0.667)]
    assert [e.value for e in events.Scalars("class_AP/cat")] == [1.5]
    assert set(events.Tags()["scalars"]) == {
        "train/lr",
        "loss/total",
        "distill/feature",
        "speed/images_per_second",
        "class_AP/cat",
        "AP/AP",
        "AP/AP50",
        "AP/AP75",
        "AP/APs",
        "AP/APm",
    }  # no APl: there is no such object


def test_a_terminal_gets_a_table_in_place_of_lines(tmp_path):
    values = {
        "lr": 0.01,
        "loss": 2.0,
        "loss_box_reg": 1.5,
        "distill_feature": 0.5,
        "lambda": 0.75,
        "gate_feature": 0.9,
        "teacher_score": 0.8,
    }
    with run_log(tmp_path, terminal=True) as log:
        for step in (1, 2):
            log.step(1, step, values, images=4, seconds=0.5)
        live = log.console.file.getvalue
        log._display._live.refresh()
        shown = live()
    assert "epoch 1/2 step 2/6  2.0 steps/s  8.0 images/s  0:00:02 left  peak 0.25 GiB" in shown
    shown_rows = shown[shown.rindex("student") :].splitlines()[1:]
    assert [" ".join(re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", row).split()) for row in shown_rows][:5] == [
        "train lr 0.01 lambda 0.75",
        "loss total 2 box_reg 1.5",
        "distill feature 0.5",
        "gate feature 0.9",
        "score teacher_score 0.8",
    ]
    assert "loss: total" not in live()


@pytest.mark.parametrize(
    "name, group",
    [
        ("loss", "loss/total"),
        ("loss_mask", "loss/mask"),
        ("distill_gaussian", "distill/gaussian"),
        ("gate_regression", "gate/regression"),
        ("other_iou", "score/other_iou"),
        ("student_score", "score/student_score"),
        ("lambda", "train/lambda"),
        ("grad_norm", "train/grad_norm"),
    ],
)
def test_every_value_has_its_group(name, group):
    assert "/".join(place(name)) == group


def test_speed_follows_the_last_steps_and_a_resumed_run_has_less_left(tmp_path):
    with run_log(tmp_path, resumed=(1, 3)) as log:
        assert log._display.line() == "student epoch 0/2 step 3/6  peak 0.25 GiB"
        log.step(2, 4, {"loss": 1.0}, images=4, seconds=10.0)
        for _ in range(200):
            log._display.update(2, 5, {}, images=4, seconds=2.0)
        assert "0.5 steps/s  2.0 images/s  0:00:02 left" in log._display.line()


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    with run_log(tmp_path) as log:
        for step in range(1, 5):
            log.step(1, step, {"loss": float(step)}, images=1, seconds=1.0)
    with open(tmp_path / "train.csv", "a") as file:
        file.write("2,1")  # a crash in the middle of a row, whose step was 12
    with run_log(tmp_path, resumed=(1, 3)) as log:
        log.step(2, 4, {"loss": 40.0}, images=1, seconds=1.0)
    table = rows(tmp_path / "train.csv")
    assert table[0] == ["epoch", "step", "loss", "seconds"]
    assert [row[1:3] for row in table[1:]] == [["1", "1"], ["2", "2"], ["3", "3"], ["4", "40"]]


def test_resuming_drops_the_evaluation_of_an_epoch_that_is_done_again(tmp_path):
    """It came after the epoch's last step, at which the checkpoint was written, and before the next one."""
    for _ in range(2):
        with run_log(tmp_path, resumed=(0, 3)) as log:
            log.evaluation(1, 3, METRICS, best=True)
    with run_log(tmp_path, resumed=(1, 3)) as log:
        log.evaluation(2, 6, METRICS, best=True)
    assert [row[:2] for row in rows(tmp_path / "eval.csv")] == [["epoch", "step"], ["1", "3"], ["2", "6"]]


def test_a_missing_value_is_an_empty_cell_and_a_new_one_an_error(tmp_path):
    table = Table(tmp_path / "t.csv", last=None)
    table.write({"step": 1, "loss": 1.0, "gate": 0.5})
    table.write({"step": 2, "loss": 1.0})
    with pytest.raises(ValueError, match="no column for extra; it has step, loss, gate"):
        table.write({"step": 3, "loss": 1.0, "gate": 0.5, "extra": 1.0})
    table.close()
    assert rows(tmp_path / "t.csv")[2] == ["2", "1", ""]


def test_the_teachers_share_of_the_time(tmp_path):
    with run_log(tmp_path) as log:
        log.step(1, 1, {"loss": 1.0}, images=4, seconds=2.0, teachers_seconds=0.5)
        assert "teacher 25% of the time" in log._display.line()


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_a_narrow_terminal_parts_no_value_from_its_name(tmp_path, width):
    losses = [f"loss_{name}" for name in ("classifier", "box_reg", "objectness", "rpn_box_reg")]
    names = ["lr", "lambda", "grad_norm", *losses, *(f"distill_{name}" for name in ("feature", "classification"))]
    values = {name: 0.0123 * place for place, name in enumerate(names)}
    with run_log(tmp_path, terminal=True, width=width) as log:
        log.step(1, 1, values, images=4, seconds=1.0, teachers_seconds=0.5)
        console = Console(file=io.StringIO(), width=width)
        console.print(log._display.table())
    shown = console.file.getvalue()
    assert all(len(line) <= width for line in shown.splitlines())
    for words in ("epoch 1/2 step 1/6", "1.0 steps/s", "4.0 images/s", "teacher 50% of the time", "peak 0.25 GiB"):
        assert words in shown
    for place_, name in enumerate(names):
        assert f"{place(name)[1]} {0.0123 * place_:.3g}" in shown


def test_slow_steps_are_told_in_seconds(tmp_path):
    with run_log(tmp_path) as log:
        log.step(1, 1, {"loss": 1.0}, images=2, seconds=90.0)
        assert "90.0 s/step  45.0 s/image  0:07:30 left" in log._display.line()


def test_without_a_value_there_is_no_file_of_tensorboards(tmp_path):
    with run_log(tmp_path, resumed=(2, 6)):
        pass
    assert not (tmp_path / "tensorboard").exists()
