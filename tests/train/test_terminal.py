"""A training goes on when nobody reads what it prints."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tardkd.train import checkpoint
from tardkd.train.terminal import patient_console

from .recipe import tree

COMMAND = "{python} -m tardkd train --config {recipe} --role baseline train.log_every=1 train.epochs=3"


def run(tmp_path: Path, line: str, **environment: str) -> subprocess.CompletedProcess:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree(tmp_path)))
    words = COMMAND.format(python=sys.executable, recipe=tmp_path / "recipe.yaml")
    return subprocess.run(
        ["bash", "-c", line.format(train=words)], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    "line",
    [
        "set -o pipefail; {train} | head -1",
        "set -o pipefail; {train} 2>&1 | true",
        "set -o pipefail; {train} --verbose | head -1",
        "{train} >&-",
        "{train} > /dev/full",
        "{train} > /dev/full 2>&1",
    ],
)
def test_a_training_goes_on_when_nobody_reads(tmp_path, line):
    shown = run(tmp_path, line)
    assert "Traceback" not in shown.stderr
    assert checkpoint.load(tmp_path / "baseline" / "last.pt")["epoch"] == 3
    assert (tmp_path / "baseline" / "train.csv").read_text().count("\n") == 1 + 9
    if "full" not in line:  # there the last line, which is the result, is what failed
        assert shown.returncode == 0, shown.stderr


def test_what_an_encoding_lacks_is_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    patient_console().print("caf\u00e9")
    stream.flush()
    assert stream.buffer.getvalue() == b"caf\\xe9\n"


def test_a_table_that_is_live_takes_other_prints(monkeypatch):
    """rich puts itself in the place of the standard output meanwhile, which must not write into itself."""
    from rich.live import Live

    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    console = patient_console()
    with Live("table", console=console, auto_refresh=False):
        print("beside it")
        console.print("on it")
    assert "beside it" in stream.getvalue() and "on it" in stream.getvalue()
