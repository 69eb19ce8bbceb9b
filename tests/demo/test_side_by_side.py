from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from tardkd.demo.side_by_side import Job, WorkerDied, count_workers, run_side_by_side
from tardkd.train.interrupt import Interrupted, Termination

PATIENCE = 120.0  # seconds; a busy machine takes long to start a process


def appears(path: Path) -> bool:
    """Waits for a file that another job is to write."""
    end = time.monotonic() + PATIENCE
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)
    return path.exists()


def meet(own: Path, other: Path, console: Console) -> str:
    """Returns only while the job that writes the other file is going on, too."""
    own.touch()
    assert appears(other), f"{other.name} did not begin beside {own.name}"
    console.print(f"{own.name} has met {other.name}", "and prints", end="")
    console.print(" a long line " + "x" * 200, soft_wrap=True)
    return own.name


def exists(path: Path, console: Console) -> bool:
    return path.exists()


def finish(path: Path, console: Console) -> int:
    """Takes a while, and leaves a file in the end; returns its process."""
    time.sleep(0.3)
    path.touch()
    return os.getpid()


def save_when_asked(folder: Path, console: Console) -> None:
    """As a training does: notes SIGTERM, saves, and ends by an error."""
    with Termination() as termination:
        (folder / "begun").write_text(str(os.getpid()))
        end = time.monotonic() + PATIENCE
        while not termination.requested and time.monotonic() < end:
            time.sleep(0.02)
    if termination.requested:
        (folder / "saved").touch()
    raise Interrupted("saved")


def fail(begun: Path, console: Console) -> None:
    appears(begun)
    raise ValueError("no such luck")


def die(begun: Path, console: Console) -> None:
    appears(begun)
    os._exit(3)


def send(kind: int, receivers: list[int], begun: Path, console: Console) -> None:
    """A signal to the processes and to its own, as Ctrl-C comes to all that a terminal has started."""
    appears(begun)
    for process in [*receivers, *([os.getpid()] if kind == signal.SIGINT else [])]:
        os.kill(process, kind)
    time.sleep(PATIENCE)


def test_jobs_go_on_at_the_same_time_and_their_lines_arrive_whole(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    lines: list[str] = []
    jobs = [
        Job("a", partial(meet, a, b)),
        Job("b", partial(meet, b, a)),
        Job("finish", partial(finish, tmp_path / "c")),
        Job("exists", partial(exists, tmp_path / "c"), after="finish"),  # a worker is free before it may begin
    ]
    outcomes = run_side_by_side(jobs, workers=2, say=lines.append)
    assert {name: outcomes[name].value for name in ("a", "b", "exists")} == {"a": "a", "b": "b", "exists": True}
    assert sorted(line.split(" x")[0] for line in lines) == [
        f"{one} has met {other} and prints a long line" for one, other in ("ab", "ba")
    ]
    assert outcomes["finish"].seconds >= 0.3 > outcomes["finish"].cpu_seconds >= 0


def test_one_worker_does_one_job_after_another(tmp_path):
    jobs = [Job(name, partial(finish, tmp_path / name)) for name in "ab"]
    outcomes = run_side_by_side(jobs, workers=1, say=print)
    assert list(outcomes) == ["a", "b"]
    assert outcomes["a"].value == outcomes["b"].value != os.getpid()


@pytest.mark.parametrize(
    "work, error, message",
    [
        (fail, ValueError, "^no such luck$"),
        (die, WorkerDied, "^the process of first died, exit code 3$"),
        (partial(send, signal.SIGTERM, [os.getpid()]), Interrupted, "^ended by SIGTERM during first, second$"),
        (partial(send, signal.SIGINT, [os.getpid()]), Interrupted, "^ended by Ctrl-C during first, second$"),
    ],
    ids=["an error", "death", "SIGTERM", "Ctrl-C"],
)
def test_what_ends_one_job_ends_all_and_lets_them_save(tmp_path, work, error, message):
    jobs = [Job("first", partial(work, tmp_path / "begun")), Job("second", partial(save_when_asked, tmp_path))]
    began = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        run_side_by_side(jobs, workers=2, say=print)
    assert (tmp_path / "saved").exists()
    assert time.monotonic() - began < PATIENCE
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "begun").read_text()), 0)
    if error is ValueError:
        assert "in fail\n" in str(caught.value.__cause__)  # where it was raised, in the other process


def test_there_is_a_worker_for_each_core_up_to_a_limit(monkeypatch):
    for cores, workers in ((1, 1), (2, 2), (64, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert count_workers() == workers
