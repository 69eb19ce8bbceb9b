"""A few of the kills of :mod:`tests.train.kills`, of which 200 take minutes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_two_processes_are_killed_and_go_on():
    """One of both or both, also while two runs are resumed at once: the end is that of a run that was left alone."""
    command = [sys.executable, "-m", "tests.train.kills", "--processes", "2", "--kills", "5", "--epochs", "12"]
    ended = subprocess.run(
        [*command, "--seed", "3", "--patience", "120"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "two at once" in ended.stdout
    assert "the run equals one that was left alone, to the bit" in ended.stdout
