"""Kills a training at random moments, resumes it each time, and compares the end with a training that was left alone.

    python -m tests.train.kills --kills 200 [--processes 2] [--record FILE]

On the built-in scenes, student with teacher, a checkpoint after every step. One kill in five is a SIGTERM, after which
the run saves and ends by itself. Of several processes one is killed or all are; a life in four is that of two runs
that are resumed at once, of which one has to stand back and say so. A process whose neighbour has died is told to end
and must do so in 10 s, as under torchrun; `--patience` gives it longer on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NoReturn

import torch
import yaml

import tardkd.train.loop  # noqa: F401 (so that no process has to load it)
from tardkd import cli
from tardkd.train import checkpoint

from .recipe import tree

WHOLE = 600.0  # seconds that the run which is left alone may take
LIVES = 0.5  # seconds that a run lives at most after its first step


class Job:
    """One run of the command, in a process or several, as torchrun would start it.

    The processes are forked, as to import torch 200 times would take longer than all steps.
    """

    def __init__(self, arguments: list[str], processes: int, errors: Path, patience: float) -> None:
        self._errors, self._patience = errors, patience
        self.statuses: dict[int, int] = {}  # of those that have ended, by their numbers
        errors.unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        self.processes = [
            self._start(arguments, world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
            for rank in range(processes)
        ]

    def _start(self, arguments: list[str], environment: dict[str, str]) -> int:
        sys.stdout.flush()
        process = os.fork()
        return process or self._run(arguments, environment)

    def _run(self, arguments: list[str], environment: dict[str, str]) -> NoReturn:
        status = 1
        try:
            os.dup2(os.open(self._errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            os.environ.update(environment)
            status = cli.main([*arguments, "--quiet"])
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)

    @property
    def errors(self) -> str:
        return self._errors.read_text(errors="replace") if self._errors.exists() else ""

    def kill(self, number: int, processes: list[int]) -> None:
        for process in set(processes) - self.statuses.keys():
            os.kill(process, number)

    def look(self) -> bool:
        """Whether all have ended; those that have are asked no more."""
        for process in self.processes:
            if process not in self.statuses:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    self.statuses[process] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) == len(self.processes)

    def end(self, within: float | None = None) -> list[int]:
        """The exit statuses of its processes in their order, or minus the signals that they died of.

        When one ends the others have as long as a process that was told to; where it failed they are told.
        """
        until = time.monotonic() + (within or self._patience)
        one_ended = told = False
        while not self.look():
            if self.statuses and not one_ended:
                one_ended, until = True, time.monotonic() + self._patience
            if any(self.statuses.values()) and not told:
                told = True
                self.kill(signal.SIGTERM, self.processes)
            if time.monotonic() > until:
                left = [self.processes.index(process) for process in self.processes if process not in self.statuses]
                self.kill(signal.SIGKILL, self.processes)
                raise SystemExit(f"hang: of the processes of {self._errors}, {left} did not end: {self.errors}")
            time.sleep(0.002)
        return [self.statuses[process] for process in self.processes]


def check_words(job: Job) -> None:
    """What a run that was killed has to say is no traceback, and no crash but the kill itself."""
    allowed = {0, 2, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL}  # 2: another process had ended
    if "Traceback" in job.errors or "FutureWarning" in job.errors or not allowed.issuperset(job.statuses.values()):
        raise SystemExit(f"a process ended with {job.statuses}: {job.errors}")


def saved_step(folder: Path) -> int:
    return checkpoint.load(folder / "last.pt")["step"] if (folder / "last.pt").exists() else 0


def logged(folder: Path) -> int:
    log = folder / "train.csv"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill_once(
    place: Path, command: list[str], folder: Path, processes: int, patience: float, number: int, rng: random.Random
) -> str:
    """One life of the run, and its end; returns what that was. The first life is one that saves a step."""
    resumed = (folder / "last.pt").exists()
    arguments = [*command, "--resume" if resumed else "--overwrite"]
    jobs = [Job(arguments, processes, place / "errors0", patience)]
    if resumed and number % 4 == 2:
        jobs.append(Job(arguments, processes, place / "errors1", patience))
    early = resumed and rng.random() < 0.25  # while it begins
    if not early:
        lines = logged(folder)
        until = time.monotonic() + 6 * patience
        while (logged(folder) <= lines or not (folder / "last.pt").exists()) and sum(job.look() for job in jobs) < len(
            jobs
        ):
            if time.monotonic() > until:
                raise SystemExit(f"hang: no step in {6 * patience:.0f} s: {[job.errors for job in jobs]}")
            time.sleep(0.002)
    time.sleep(rng.random() * LIVES)
    kind = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
    whose = rng.choice(["all", *range(processes)]) if processes > 1 else "all"
    stood_back = 0
    for job in jobs:
        if len(jobs) > 1 and job.look() and any(job.statuses.values()):
            stood_back += 1
            if "writes into" not in job.errors:
                raise SystemExit(f"of two runs that were resumed at once one ended with: {job.errors}")
            continue
        job.kill(kind, job.processes if whose == "all" else [job.processes[whose]])
    over = [not any(job.end()) for job in jobs]
    for job in jobs:
        check_words(job)
    if stood_back == 2:
        raise SystemExit(f"of two runs that were resumed at once none went on: {[job.errors for job in jobs]}")
    where = "after the last step" if any(over) else "while beginning" if early else "while training"
    return f"{kind.name} of {'all' if whose == 'all' else f'process {whose}'} {where}" + (
        f", two at once ({stood_back} stood back)" if len(jobs) > 1 else ""
    )


def compare(killed: Path, whole: Path) -> None:
    """The end of both runs is the same to the bit."""
    states = [checkpoint.load(folder / "last.pt") for folder in (killed, whole)]
    for key in ("model", "task", "optimizer", "step", "metrics", "best_ap"):
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0)
    for table in ("train.csv", "eval.csv"):
        rows = [(folder / table).read_text().splitlines() for folder in (killed, whole)]
        if table == "train.csv":
            rows = [[row.rpartition(",")[0] for row in of_run] for of_run in rows]  # but for the seconds
        if rows[0] != rows[1]:
            raise SystemExit(f"{killed / table} is not {whole / table}")
    left = [path.name for path in killed.iterdir() if path.name.endswith((".tmp", ".lock"))]
    if left:
        raise SystemExit(f"{killed} still holds {', '.join(left)}")


def kill_and_compare(place: Path, kills: int, processes: int, epochs: int, seed: int, patience: float) -> Counter[str]:
    """Kill a run so many times, and hold its end against that of one that was left alone; counts the kinds of kills."""
    rng = random.Random(seed)
    description = tree(Path("killed"))
    description["data"]["train"] = 20
    description["train"] |= {"save_every": 1, "epochs": epochs, "eval_every": 5}
    (place / "recipe.yaml").write_text(yaml.safe_dump(description))
    command = ["train", "--config", str(place / "recipe.yaml"), f"train.epochs={epochs}"]
    teacher = Job([*command, "--role", "teacher", f"output={place}", "train.epochs=1"], 1, place / "errors", patience)
    if teacher.end(WHOLE) != [0]:
        raise SystemExit(f"the teacher's training failed: {teacher.errors}")
    command += ["--role", "distilled", f"teacher.weights={place}/teacher/last.pt"]
    of_killed, killed = [*command, f"output={place}/killed"], place / "killed/distilled"
    kinds: Counter[str] = Counter()
    step = 0
    for number in range(1, kills + 1):
        kind = kill_once(place, of_killed, killed, processes, patience, number, rng)
        before, step = step, saved_step(killed)
        if step < before:
            raise SystemExit(f"the checkpoint went back from step {before} to {step}")
        kinds[kind] += 1
        print(f"{number:4d} {kind}: steps {before} to {step} saved", flush=True)
    last = Job([*of_killed, "--resume"], processes, place / "errors0", patience)
    if last.end(WHOLE) != [0] * processes:
        raise SystemExit(f"the last resumed run failed: {last.errors}")
    whole = Job([*command, f"output={place}/whole"], processes, place / "errors0", patience)
    if whole.end(WHOLE) != [0] * processes:
        raise SystemExit(f"the run that was left alone failed: {whole.errors}")
    compare(killed, place / "whole/distilled")
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.train.kills", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=150, help="of ten steps; so many that the kills end before them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--patience", type=float, default=10, help="seconds in which a process that was told to must end"
    )
    parser.add_argument("--record", type=Path, help="a JSON file to write what was done to")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        kinds = kill_and_compare(
            Path(place), options.kills, options.processes, options.epochs, options.seed, options.patience
        )
        steps = saved_step(Path(place) / "killed/distilled")
    print(f"{options.kills} kills, {steps} steps: the run equals one that was left alone, to the bit")
    if options.record:
        record = {
            "kills": options.kills,
            "processes": options.processes,
            "seed": options.seed,
            "seconds": round(time.monotonic() - began),
            "steps": steps,
            "kinds": dict(sorted(kinds.items())),
            "equal to a run that was left alone": True,
        }
        options.record.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
