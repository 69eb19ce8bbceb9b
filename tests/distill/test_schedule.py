"""Schedules as tables of numbers."""

from __future__ import annotations

import warnings

import pytest
import torch
from detectors.tiny import tiny_batch, tiny_detector

from tardkd.distill import Distiller, Schedule, ScheduleSettings


def table(epochs: int, steps: int, **settings: object) -> list[float]:
    """lambda at every iteration of a training, rounded."""
    schedule = Schedule(ScheduleSettings(**settings))
    schedule.start(epochs, steps)
    values = []
    for epoch in range(epochs):
        for step in range(steps):
            schedule.set_progress(epoch, step)
            values.append(round(schedule.value, 4))
    return values


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]),
        ({"per": "iteration"}, [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ({"kind": "constant"}, [1.0] * 8),
        ({"kind": "cosine"}, [1.0, 1.0, 0.8536, 0.8536, 0.5, 0.5, 0.1464, 0.1464]),
        (
            {"kind": "cosine", "per": "iteration"},
            [1.0, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381],
        ),
        (
            {"kind": "step", "milestones": (0.5, 0.75), "gamma": 0.1},
            [1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01],
        ),
        (
            {"kind": "step", "milestones": (0.3,), "gamma": 0.5, "per": "iteration"},
            [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5],
        ),
        ({"kind": "constant", "warmup": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"warmup": 4}, [0.25, 0.5, 0.5625, 0.75, 0.5, 0.5, 0.25, 0.25]),
        ({"stop": 0.5}, [1.0, 1.0, 0.75, 0.75, 0.0, 0.0, 0.0, 0.0]),
        ({"stop": 0.6}, [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.0, 0.0]),
        (
            {"kind": "constant", "stop": 0.6, "per": "iteration"},
            [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0],
        ),
    ],
)
def test_values(settings: dict[str, object], expected: list[float]) -> None:
    assert table(4, 2, **settings) == expected


def test_one_epoch() -> None:
    assert table(1, 2) == [1.0, 1.0]


def test_before_start_it_is_one() -> None:
    schedule = Schedule(ScheduleSettings(warmup=10))
    assert schedule.value == 1.0
    with pytest.raises(RuntimeError, match=r"call start\(total_epochs, steps_per_epoch\) before"):
        schedule.set_progress(0, 0)


def test_past_the_end_it_stays() -> None:
    schedule = Schedule(ScheduleSettings(kind="cosine"))
    schedule.start(2, 2)
    with pytest.warns(UserWarning, match="beyond the end"):
        schedule.set_progress(9, 0)
    assert schedule.value == 0.0


@pytest.mark.parametrize("length", [(0, 1), (1, 0)])
def test_no_length(length: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"total_epochs={length[0]}, steps_per_epoch={length[1]}"):
        Schedule(ScheduleSettings()).start(*length)


@pytest.mark.parametrize("position", [(-1, 0), (0, -1)])
def test_no_position(position: tuple[int, int]) -> None:
    schedule = Schedule(ScheduleSettings())
    schedule.start(2, 2)
    with pytest.raises(ValueError, match=f"epoch={position[0]}, step={position[1]}"):
        schedule.set_progress(*position)


def test_state() -> None:
    schedule, other = Schedule(ScheduleSettings()), Schedule(ScheduleSettings())
    schedule.start(4, 2)
    schedule.set_progress(3, 1)
    other.load_state_dict(schedule.state_dict())
    assert other.value == schedule.value == 0.25
    assert schedule.state_dict() == {"total_epochs": 4, "steps_per_epoch": 2, "epoch": 3, "step": 1}


# --- positions that nobody tells, or that cannot be ----------------------------------------------------------


def caught(schedule: Schedule, steps: int) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(steps):
            schedule.count_step()
    return [str(warning.message) for warning in seen]


def test_steps_of_several_epochs_without_a_position_are_warned_of_once() -> None:
    schedule = Schedule(ScheduleSettings())
    schedule.start(10, 4)
    assert caught(schedule, 8) == []
    (message,) = caught(schedule, 20)
    assert "9 steps" in message and "without a call of set_progress(epoch, step): lambda is still 1" in message


@pytest.mark.parametrize(
    "settings, started, told",
    [
        (ScheduleSettings(), False, False),
        (ScheduleSettings(), True, True),
        (ScheduleSettings(kind="constant"), True, False),
    ],
    ids=["not started", "told", "nothing moves"],
)
def test_no_warning_where_nothing_is_wrong(settings: ScheduleSettings, started: bool, told: bool) -> None:
    schedule = Schedule(settings)
    if started:
        schedule.start(10, 4)
    if told:
        schedule.set_progress(0, 0)
    assert caught(schedule, 30) == []


@pytest.mark.parametrize("settings", [{"warmup": 5}, {"stop": 0.5}])
def test_a_constant_that_begins_or_ends_moves(settings: dict[str, float]) -> None:
    schedule = Schedule(ScheduleSettings(kind="constant", **settings))
    schedule.start(10, 4)
    assert len(caught(schedule, 30)) == 1


@pytest.mark.parametrize("position", [(3, 0), (7, 1), (0, 4)])
def test_a_position_beyond_the_end_is_warned_of_once(position: tuple[int, int]) -> None:
    schedule = Schedule(ScheduleSettings())
    schedule.start(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.set_progress(2, 3)
    with pytest.warns(UserWarning, match=r"set_progress\(\d, \d\) is beyond the end: .*3 epochs of 4 steps"):
        schedule.set_progress(*position)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.set_progress(*position)


def test_a_distiller_counts_its_steps() -> None:
    distiller = Distiller(tiny_detector(), tiny_detector(seed=1))
    distiller.start(5, 1)
    with torch.no_grad():
        distiller(*tiny_batch())
        distiller(*tiny_batch())
        with pytest.warns(UserWarning, match="3 steps, more than two epochs"):
            distiller(*tiny_batch())
