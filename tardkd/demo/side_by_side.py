"""Jobs side by side, each in a process of its own.

A small detector's operations are too short for several threads to share: on two cores, two trainings with one thread
each are done sooner than the same two with two threads each, one after the other.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from rich.console import Console

from tardkd.train.interrupt import Interrupted, Termination

MOST = 4  # workers; each holds a copy of torch, of the data and of its models
PATIENCE = 10.0  # seconds in which a worker that is told to end may save what it has


class WorkerDied(RuntimeError):
    """A worker's process is gone without a word, as when the system is out of memory; the message names its job."""


@dataclass(frozen=True)
class Job:
    """Work for one process. The function and what it returns must be picklable."""

    name: str
    function: Callable[[Console], Any]  # gets a console whose lines the first process shows
    after: str | None = None  # the job that must be done before this one may begin


@dataclass(frozen=True)
class Outcome:
    """What a job returned, and how long it took: on the clock, and of the processor's time."""

    value: Any
    seconds: float
    cpu_seconds: float


def count_workers() -> int:
    """One for each core that this process may use, up to a limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST)


def run_side_by_side(jobs: Sequence[Job], *, workers: int, say: Callable[[str], None]) -> dict[str, Outcome]:
    """Does the jobs, as many at a time as there are workers, begun in their order; returns their outcomes by name.

    Every line that a job prints goes to `say`. The first job that fails ends them all, and so does Ctrl-C or SIGTERM:
    the workers then get SIGTERM, on which a training saves what it has.

    Raises:
        Interrupted: by SIGTERM or Ctrl-C.
        WorkerDied: a process ended by itself.
        Exception: what a job raised.
    """
    waiting = list(jobs)
    running: dict[_Worker, Job] = {}
    outcomes: dict[str, Outcome] = {}
    team: list[_Worker] = []
    with Termination() as termination:
        try:
            team.extend(_Worker() for _ in range(min(workers, len(jobs))))
            while len(outcomes) < len(jobs):
                for worker in team:
                    ready = [job for job in waiting if job.after is None or job.after in outcomes]
                    if worker not in running and ready:
                        running[worker] = ready[0]
                        waiting.remove(ready[0])
                        worker.begin(ready[0])
                for worker in _that_speak(running):
                    message = worker.receive(running[worker])
                    if isinstance(message, str):
                        say(message)
                    else:
                        outcomes[running.pop(worker).name] = message
                if termination.number is not None:
                    during = ", ".join(job.name for job in running.values())
                    raise Interrupted(f"ended by {termination.name} during {during}", termination.number)
        except BaseException:
            for worker in team:
                worker.terminate()
            raise
        finally:
            for worker in team:
                worker.end()
    return outcomes


class _Worker:
    """A process that does one job after another, as seen by the process that hands them out."""

    def __init__(self) -> None:
        # Not forked: neither CUDA nor a library's threads survive that.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        with _without_interrupts():
            self.process.start()
        theirs.close()

    def begin(self, job: Job) -> None:
        # One that has died meanwhile tells so when it is waited for.
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(job.function)

    def receive(self, job: Job) -> str | Outcome:
        """What comes next from the job that was begun: a line that it has printed, or its outcome in the end."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise WorkerDied(f"the process of {job.name} died, exit code {self.process.exitcode}") from None
        if isinstance(message, _Failure):
            raise message.error from RuntimeError(f"in the process of {job.name}:\n{message.text}")
        return message

    def terminate(self) -> None:
        self.process.terminate()

    def end(self) -> None:
        """Lets a worker without a job go home; one that has been told to end may finish its step first."""
        self.connection.close()
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()


def _that_speak(workers: Iterable[_Worker]) -> list[_Worker]:
    """Those with something to be received, after half a second at most: to wait for ever would be deaf to a signal."""
    by_connection = {worker.connection: worker for worker in workers}
    return [by_connection[one] for one in wait(list(by_connection), timeout=0.5)]


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started meanwhile ignore Ctrl-C for good, which reaches all that a terminal has started."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # only the main thread may set it
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ---- in the workers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Failure:
    error: Exception
    text: str  # the traceback, which a pickled exception loses


def _work(parent: Connection) -> None:
    """Does what the parent sends, until it closes the connection or dies."""
    console = Console(file=_Lines(parent), force_terminal=False)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            parent.send(_attempt(parent.recv(), console))


def _attempt(function: Callable[[Console], Any], console: Console) -> Outcome | _Failure:
    began, cpu_began = time.perf_counter(), time.process_time()
    try:
        value = function(console)
    except Exception as error:
        return _Failure(error, traceback.format_exc())
    return Outcome(value, time.perf_counter() - began, time.process_time() - cpu_began)


class _Lines(io.TextIOBase):
    """A text file whose lines are sent over a connection, each when it is complete."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._line = connection, ""

    def write(self, text: str) -> int:
        *whole, self._line = (self._line + text).split("\n")
        for line in whole:
            self._connection.send(line)
        return len(text)
