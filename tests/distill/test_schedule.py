"""Schedules as tables of numbers."""

from __future__ import annotations

import pytest

from tardkd.distill import Schedule, ScheduleSettings


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
