"""A run that is killed, or told to end, goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tardkd import cli
from tardkd.train import checkpoint, loop
from tardkd.train.interrupt import NAMES, Interrupted, Termination
from tardkd.train.loop import train

from .recipe import recipe, tree


class Crash(Exception):
    pass


def at_step(patch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Do `action` when that step (from 1) is done but not saved."""
    original = loop.RunLog.step

    def record(self, epoch, number, *args, **kwargs):
        original(self, epoch, number, *args, **kwargs)
        if number == step:
            action()

    patch.setattr(loop.RunLog, "step", record)


def crash() -> None:
    raise Crash


def assert_same(left, right) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def assert_same_run(left: Path, right: Path) -> None:
    one, two = (checkpoint.load(folder / "last.pt") for folder in (left, right))
    assert_same(one["model"], two["model"])
    assert all(str(one[key]) == str(two[key]) for key in ("optimizer", "task"))  # tensors by what they print
    assert_same({**one["optimizer"]["state"]}, {**two["optimizer"]["state"]})
    assert all(one[key] == two[key] for key in ("epoch", "batch", "step", "best_ap", "metrics"))
    for name in ("train.csv", "eval.csv"):
        rows = [(folder / name).read_text().splitlines() for folder in (left, right)]
        if name == "train.csv":
            rows = [[row.rpartition(",")[0] for row in of_run] for of_run in rows]  # but for the seconds
        assert rows[0] == rows[1]


@pytest.mark.parametrize("role", ["baseline", "distilled"])
@pytest.mark.parametrize("step", [2, 3, 4])  # of three an epoch
def test_resume_after_any_step(runs, tmp_path, monkeypatch, role, step):
    extra = "train.save_every=1", f"teacher.weights={runs}/teacher/last.pt"
    config = recipe(tmp_path, *extra).for_role(role)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        at_step(patch, step, crash)
        train(config)
    assert checkpoint.load(tmp_path / role / "last.pt")["step"] == step - 1
    torch.rand(5)  # a new process would not have the old generators
    train(config, resume=True)
    whole = recipe(tmp_path / "whole", *extra).for_role(role)
    train(whole)
    assert_same_run(Path(config.output), Path(whole.output))


def test_told_to_end_it_saves_first(runs, tmp_path, monkeypatch):
    config = recipe(tmp_path).for_role("baseline")
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted, match=r"ended by SIGTERM after step 2, which .*last\.pt holds"):
            train(config)
    train(config, resume=True)
    assert_same_run(tmp_path / "baseline", runs / "baseline")


def test_ctrl_c_saves_and_says_how_to_go_on(runs, tmp_path, monkeypatch, capsys):
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(tree(tmp_path)))
    command = ["train", "--config", str(recipe_file), "--role", "baseline"]
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert cli.main(command) == 130
    last = tmp_path / "baseline" / "last.pt"
    expected = f"ended by Ctrl-C after step 2, which {last} holds; --resume goes on from there"
    assert expected in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    assert_same_run(tmp_path / "baseline", runs / "baseline")


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(patch, 2, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
        train(recipe(tmp_path).for_role("baseline"))
    try:
        with Termination(is_alone=False) as termination:  # torchrun repeats the first one
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:  # which would end all tests
        pytest.fail("of several processes one ended at once")
    assert termination.requested and termination.name == "Ctrl-C"


def test_told_to_end_while_it_evaluates(runs, tmp_path, monkeypatch):
    config = recipe(tmp_path).for_role("baseline")
    original = loop.evaluate

    def told(model, batches, *others):
        signal.raise_signal(signal.SIGTERM)
        return original(model, batches, *others)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", told)
        with pytest.raises(Interrupted, match="after step 3"):
            train(config)
    assert checkpoint.load(tmp_path / "baseline" / "last.pt")["batch"] == 3
    train(config, resume=True)
    assert_same_run(tmp_path / "baseline", runs / "baseline")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_leave_the_signal_to_the_run(tmp_path, number):
    """As of a scheduler or a terminal, which tell every process of a job to end."""
    description = tree(tmp_path)
    description["train"] |= {"workers": 1, "epochs": 50}
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(description))
    command = [sys.executable, "-m", "tardkd", "train", "--config", str(config), "--role", "baseline"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path, start_new_session=True
    )
    wait_for_another_step(tmp_path / "baseline", process)
    os.killpg(process.pid, number)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 128 + number and f"ended by {NAMES[number]}" in output, output


def test_the_signal_is_given_back():
    before = [signal.getsignal(number) for number in NAMES]
    for number in NAMES:
        with Termination() as termination:
            assert not termination.requested
            signal.raise_signal(number)
            assert termination.requested and termination.name == NAMES[number]
    assert [signal.getsignal(number) for number in NAMES] == before


def test_killed_at_random_moments(tmp_path):
    """Real processes: whatever they were doing, writing a checkpoint included, nothing is lost."""
    description = tree(tmp_path / "parts")
    description["train"] |= {"save_every": 1, "epochs": 6}
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(description))
    command = [sys.executable, "-m", "tardkd", "train", "--config", str(config), "--role", "baseline"]
    folder, generator = tmp_path / "parts" / "baseline", random.Random(0)
    ends = []
    for kill in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, None):
        resume = ["--resume"] if (folder / "last.pt").exists() else ["--overwrite"]
        process = subprocess.Popen([*command, *resume], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path)
        if kill is not None:
            wait_for_another_step(folder, process)
            time.sleep(generator.random() * 0.15)
            process.send_signal(kill)
        output = process.communicate(timeout=120)[0].decode()
        ends.append(process.returncode)
        assert process.returncode in (0, 143, -signal.SIGKILL), output
    assert ends == [-signal.SIGKILL, 143, -signal.SIGKILL, 0]
    whole = recipe(tmp_path / "whole", "train.save_every=1", "train.epochs=6").for_role("baseline")
    train(whole)
    assert_same_run(folder, Path(whole.output))


def wait_for_another_step(folder: Path, process: subprocess.Popen) -> None:
    log = folder / "train.csv"
    lines = log.read_text().count("\n") if log.exists() else 0
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") <= lines):
        time.sleep(0.005)
