"""Several processes train as one. Real processes, started by torchrun, with gloo between them."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tardkd.train import checkpoint
from tardkd.train.config import ConfigError
from tardkd.train.distributed import pick_device
from tardkd.train.loop import train

from .recipe import recipe, tree

# Every image gives the same number of regions, so that a mean over processes is the mean over the images.
EVEN = (
    "data.train=8",
    "data.val=3",
    "train.batch_size=4",
    "student.rpn_post_nms_top_n_train=40",
    "student.box_batch_size_per_image=12",
    "distill.feature_norm=none",  # the moments of a channel are those of a process's own images
)


def torchrun(folder: Path, config: Path, *arguments: str, count: int = 2) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        "-m",
        "tardkd",
        "train",
        "--config",
        str(config),
        *arguments,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen) -> str:
    """What it printed; its whole group is gone afterwards."""
    try:
        return process.communicate(timeout=240)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def written(folder: Path, name: str = "recipe.yaml") -> Path:
    (folder / name).write_text(yaml.safe_dump(tree(Path("out"))))
    return folder / name


def losses(path: Path) -> list[dict[str, float]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: float(value) for name, value in row.items() if "loss" in name or "distill" in name} for row in rows]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_are_one(runs, tmp_path, accumulate):
    """The losses, the weights and the precision of one process that has the whole batch."""
    shared = [*EVEN, f"teacher.weights={runs}/teacher/last.pt"]
    role = "distilled" if accumulate == 1 else "baseline"  # gates are counted within a part
    process = torchrun(tmp_path, written(tmp_path), "--role", role, *shared, f"train.accumulate={accumulate}")
    output = finished(process)
    assert process.returncode == 0, output
    two = tmp_path / "out" / role
    whole = train(recipe(tmp_path / "whole", *shared).for_role(role))
    for left, right in zip(losses(two / "train.csv"), losses(whole.folder / "train.csv"), strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-6)
    one = checkpoint.load(whole.folder / "last.pt")
    state = checkpoint.load(two / "last.pt")
    torch.testing.assert_close(state["model"], one["model"], rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(state["task"], one["task"], rtol=1e-4, atol=2e-6)
    assert state["metrics"]["AP"] == pytest.approx(one["metrics"]["AP"], abs=0.5)
    assert len((two / "eval.csv").read_text().splitlines()) == 1 + 2  # one process writes
    assert output.count("best AP") == 1


def test_one_that_fails_ends_all_with_its_message(tmp_path):
    description = written(tmp_path)
    program = tmp_path / "failing.py"
    program.write_text("""
import os, sys
from tardkd.train import loop
from tardkd.cli import main
original = loop.Update.gradients
def gradients(self, step, parts):
    if self.processes.rank == 1 and step == 2:
        raise FloatingPointError("NaN or infinity in the teacher")
    return original(self, step, parts)
loop.Update.gradients = gradients
sys.exit(main(sys.argv[1:]))
""")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(program),
        "train",
        "--config",
        str(description),
        "--role",
        "baseline",
        *EVEN,
    ]
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    output = finished(process)
    assert process.returncode != 0
    assert "tardkd: process 1: NaN or infinity in the teacher at step 3, images" in output, output
    assert time.monotonic() - began < 120


def test_told_to_end_all_save_once_and_one_process_goes_on(tmp_path):
    """torchrun passes SIGTERM on; its own number of processes may be another one afterwards."""
    description, folder = written(tmp_path), tmp_path / "out" / "baseline"
    process = torchrun(tmp_path, description, "--role", "baseline", *EVEN, "train.epochs=40")
    deadline = time.monotonic() + 120
    while not (folder / "train.csv").exists() or (folder / "train.csv").read_text().count("\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline, finished(process)
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = finished(process)
    assert "ended by SIGTERM after step" in output, output
    step = checkpoint.load(folder / "last.pt")["step"]
    assert step >= 3
    command = [
        sys.executable,
        "-m",
        "tardkd",
        "train",
        "--config",
        str(description),
        "--role",
        "baseline",
        *EVEN,
        "train.epochs=40",
        "--resume",
    ]
    alone = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while (folder / "train.csv").read_text().count("\n") < step + 3:
        assert alone.poll() is None and time.monotonic() < deadline + 60, finished(alone)
        time.sleep(0.02)
    alone.terminate()
    assert "ended by SIGTERM" in alone.communicate(timeout=60)[0]
    assert checkpoint.load(folder / "last.pt")["step"] > step


def test_more_processes_than_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="process 2 of this machine has no GPU: torch finds 2"):
        pick_device("cuda", 2)
