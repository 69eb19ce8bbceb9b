"""What ``tardkd.train`` gives to programs, and how they follow a run."""

from __future__ import annotations

import csv
import io
import subprocess
import sys

import pytest
from rich.console import Console

from tardkd import train as api

from .recipe import recipe


def python(code: str) -> str:
    """The output of a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", api.__all__)
def test_every_name_can_be_called(name):
    assert callable(getattr(api, name)), name
    assert name in dir(api)


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = api.trian


def test_to_import_the_package_imports_nothing_else():
    """The command line reads it before it knows whether torch is needed, or there."""
    assert python("import sys, tardkd.train; print('torch' in sys.modules, 'pydantic' in sys.modules)") == "False False"


def test_a_run_from_python_tells_its_numbers(tmp_path):
    seen = []
    console = Console(file=io.StringIO(), quiet=True)
    config = recipe(tmp_path, "data.train=4", "train.epochs=1").for_role("baseline")
    result = api.train(config, on_log=seen.append, console=console)
    assert [(row["epoch"], row["step"]) for row in seen] == [(1, 1), (1, 2), (1, 2)]
    assert {"loss", "loss_classifier", "lr", "grad_norm", "seconds"} <= seen[0].keys()
    assert seen[-1]["AP"] == result.metrics["AP"] and any(name.startswith("AP/") for name in seen[-1])
    with open(result.folder / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row.keys() for row in rows] == [row.keys() for row in seen[:2]]
    assert [float(row["loss"]) for row in rows] == pytest.approx([row["loss"] for row in seen[:2]], rel=1e-5)
    assert console.file.getvalue() == ""
