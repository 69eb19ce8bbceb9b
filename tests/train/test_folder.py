"""Output folders are claimed, and never cleared of what is not our own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from tardkd.files import LOCK, FolderInUseError, FolderLock
from tardkd.train.checkpoint import CheckpointError
from tardkd.train.config import ConfigError
from tardkd.train.loop import train

from .recipe import recipe, tree


def test_an_output_folder_in_use_is_refused(runs, tmp_path):
    config = recipe(tmp_path, "train.epochs=1", "data.train=2").for_role("baseline")
    folder = tmp_path / "baseline"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "train.csv").write_text("epoch,step\n9,9\n")
    with pytest.raises(ConfigError, match=r"is in use \(it holds train.csv\); --resume"):
        train(config)
    assert (folder / "train.csv").read_text() == "epoch,step\n9,9\n"
    train(config, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert "9,9" not in (folder / "train.csv").read_text()


def test_nothing_is_made_where_the_run_cannot_start(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint at .*teacher/last.pt"):
        train(recipe(tmp_path).for_role("distilled"))
    with pytest.raises(ConfigError, match="teacher.weights: required"):
        train(recipe(tmp_path / "x"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["new", "resume", "overwrite"])
def test_a_folder_that_another_run_writes_into_is_refused(runs, tmp_path, how):
    """Before anything in it is looked at or removed."""
    shutil.copytree(runs / "baseline", tmp_path / "baseline")
    before = {path.name: path.read_bytes() for path in (tmp_path / "baseline").iterdir() if path.is_file()}
    holder = "import sys, pathlib, time; from tardkd.files import FolderLock\n"
    holder += "FolderLock(pathlib.Path(sys.argv[1])).take(); print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", holder, str(tmp_path / "baseline")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            config = recipe(tmp_path).for_role("baseline")
            with pytest.raises(
                FolderInUseError, match=f"process {process.pid} on .* writes into {tmp_path}/baseline; wait"
            ):
                train(config, resume=how == "resume", overwrite=how == "overwrite")
        finally:
            process.kill()
    (tmp_path / "baseline" / LOCK).unlink()
    assert {path.name: path.read_bytes() for path in (tmp_path / "baseline").iterdir() if path.is_file()} == before


def test_of_two_that_resume_at_once_one_goes_on(tmp_path):
    """Real processes, several times: nothing is lost, and the other one says why it ends."""
    description = tree(tmp_path)
    description["train"] |= {"epochs": 40, "save_every": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(description))
    command = [sys.executable, "-m", "tardkd", "train", "--config", str(tmp_path / "recipe.yaml"), "--role", "baseline"]
    log = tmp_path / "baseline" / "train.csv"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        wait_for_steps(log, 3)
        process.kill()
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, "--resume"], **settings) for _ in range(2)]
    ends = sorted((process.communicate()[1], process.returncode) for process in both)
    assert [status for _, status in ends] == [0, 2], ends
    assert f"writes into {tmp_path}/baseline; wait until it has ended" in ends[1][0]
    steps = [int(row.split(",")[1]) for row in log.read_text().splitlines()[1:]]
    assert steps == list(range(1, 121))
    assert not [path for path in os.listdir(tmp_path / "baseline") if path.endswith((".tmp", LOCK))]


def wait_for_steps(log, count):
    until = time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") > count):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_one_process_does_not_train_twice_into_one_folder(tmp_path):
    config = recipe(tmp_path, "train.epochs=1", "data.train=2").for_role("baseline")
    (tmp_path / "baseline").mkdir()
    with FolderLock(tmp_path / "baseline") as lock:
        lock.take()
        with pytest.raises(FolderInUseError, match="this process writes into"):
            train(config)
    train(config)
    assert LOCK not in os.listdir(tmp_path / "baseline")


def test_what_a_killed_run_was_writing_is_removed(runs, tmp_path):
    shutil.copytree(runs / "baseline", tmp_path / "baseline")
    (tmp_path / "baseline" / "last.pt.0badcafe.tmp").write_bytes(b"half")
    train(recipe(tmp_path).for_role("baseline"), resume=True)
    assert not list((tmp_path / "baseline").glob("*.tmp"))


# Root may write anywhere: there the command runs without that right, as an ordinary owner of the files has it.
ORDINARY = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


@pytest.mark.skipif(bool(ORDINARY) and shutil.which("setpriv") is None, reason="root cannot give up its rights here")
@pytest.mark.parametrize(
    "name, mode, message",
    [
        (".", 0o500, "cannot write into {folder}: Permission denied"),
        ("last.pt", 0o000, "cannot read {folder}/last.pt as a checkpoint: Permission denied"),
        ("train.csv", 0o000, "cannot read {folder}/train.csv: Permission denied"),
        ("tensorboard", 0o500, "cannot write into {folder}/tensorboard: Permission denied"),
    ],
)
def test_what_may_not_be_read_or_written_is_named(runs, tmp_path, name, mode, message):
    """One message; what the run had saved is as it was."""
    folder = tmp_path / "baseline"
    shutil.copytree(runs / "baseline", folder)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree(tmp_path)))
    command = ["train", "--config", str(tmp_path / "recipe.yaml"), "--role", "baseline", "--resume", "train.epochs=3"]
    before = (folder / "last.pt").read_bytes()
    (folder / name).chmod(mode)
    ended = subprocess.run([*ORDINARY, sys.executable, "-m", "tardkd", *command], capture_output=True, text=True)
    (folder / name).chmod(0o700)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert message.format(folder=folder) in ended.stderr
    assert (folder / "last.pt").read_bytes() == before


def test_resuming_leaves_the_configuration_as_somebody_has_written_it(runs, tmp_path):
    """Unless settings are given anew: then the file says what the run goes on with."""
    shutil.copytree(runs / "baseline", tmp_path / "baseline")
    path = tmp_path / "baseline" / "config.yaml"
    train(recipe(tmp_path).for_role("baseline"), resume=True)  # for this output
    own = "# tried for the paper\n" + path.read_text()
    path.write_text(own)
    train(recipe(tmp_path).for_role("baseline"), resume=True)
    assert path.read_text() == own
    train(recipe(tmp_path, "train.epochs=3").for_role("baseline"), resume=True)
    assert yaml.safe_load(path.read_text())["train"]["epochs"] == 3
    path.write_text("[" * 5000)
    train(recipe(tmp_path, "train.epochs=3").for_role("baseline"), resume=True)
    assert yaml.safe_load(path.read_text())["train"]["epochs"] == 3
