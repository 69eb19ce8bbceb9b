"""Kills a training at random moments, resumes it each time, and compares the end with a training that was left alone.

    python tests/train/kills.py --kills 200 --out FOLDER [--log FILE]

On the built-in scenes, student with teacher, a checkpoint after every step. One kill in five is a SIGTERM, after which
the run saves and ends by itself. Not a test that pytest collects: 200 kills take minutes.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from rich.console import Console

from tardkd.demo.demo import demo_recipe
from tardkd.train import checkpoint
from tardkd.train.config import Config, parse_config
from tardkd.train.interrupt import Interrupted
from tardkd.train.loop import train

SETTINGS = (
    "data.image_size=96",
    "student.min_size=96",
    "student.max_size=96",
    "teacher.model.min_size=96",
    "teacher.model.max_size=96",
    "data.train=40",
    "data.val=4",
    "train.batch_size=4",
    "train.save_every=1",
    "train.threads=1",
    "train.eval_every=10",
)


def configuration(out: Path, name: str, epochs: int) -> Config:
    overrides = [*SETTINGS, f"train.epochs={epochs}", f"teacher.weights={out}/teacher/last.pt"]
    return parse_config({**demo_recipe(), "output": str(out / name)}, overrides, source="demo.yaml")


def start(config: Config, resume: bool) -> int:
    """The training in a process of its own; forked, as to import torch 200 times would take longer than all steps."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        with open(os.devnull, "w") as silence:
            train(config, resume=resume, overwrite=not resume, console=Console(file=silence))
        status = 0
    except Interrupted:
        status = 143
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(process: int) -> int:
    """Its exit status, or minus the signal that it died of."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--longest", type=float, default=1.5, help="seconds that a process lives at most")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    lines: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    config = configuration(options.out, "killed", options.epochs)
    if ended(start(configuration(options.out, ".", 1).for_role("teacher"), resume=False)):
        raise SystemExit("the teacher's training failed")
    generator = random.Random(0)
    last = Path(config.output) / "last.pt"
    kills = step = lives = 0
    while kills < options.kills:
        lives += 1
        process = start(config, resume=last.exists())
        kind = signal.SIGTERM if generator.random() < 0.2 else signal.SIGKILL
        seconds = generator.random() * options.longest
        time.sleep(seconds)
        os.kill(process, kind)
        status = ended(process)
        if status == 0:
            raise SystemExit(f"the run was over after {kills} kills; --epochs {options.epochs} is too short")
        if status not in (143, -signal.SIGKILL, -signal.SIGTERM):  # the last: before it listened
            raise SystemExit(f"the run failed with status {status}")
        before, step = step, checkpoint.load(last)["step"] if last.exists() else 0
        if step < before:
            raise SystemExit(f"the checkpoint went back from step {before} to {step}")
        kills += 1
        leftover = " (while writing a checkpoint)" if list(last.parent.glob("last.pt.*.tmp")) else ""
        say(f"{kills:4d} {kind.name} after {seconds:.2f} s: steps {before} to {step} saved{leftover}")
    if ended(start(config, resume=last.exists())):
        raise SystemExit("the last resumed run failed")
    whole = configuration(options.out, "whole", options.epochs)
    if ended(start(whole, resume=False)):
        raise SystemExit("the run that was left alone failed")

    states = [checkpoint.load(Path(one.output) / "last.pt") for one in (config, whole)]
    for key in ("model", "task", "optimizer", "step", "metrics", "best_ap"):
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0)
    for table in ("train.csv", "eval.csv"):
        rows = [(Path(one.output) / table).read_text().splitlines() for one in (config, whole)]
        if table == "train.csv":
            rows = [[row.rpartition(",")[0] for row in of_run] for of_run in rows]  # but for the seconds
        assert rows[0] == rows[1], table
    say(
        f"{kills} kills, {states[0]['step']} steps: weights, optimizer, metrics and logs equal those of a run that was "
        "left alone, to the bit"
    )
    if options.log:
        options.log.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
