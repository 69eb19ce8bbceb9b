"""The output folder and the optimizer."""

from __future__ import annotations

import yaml
from rich.console import Console
from train.recipe import tree

from tardkd.doctor import examine

from .reports import doctor, found


def test_the_output_folder(tmp_path, runs):
    changes = {"output": str(runs)}
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump({**tree(tmp_path), **changes}))

    def look(*overrides):
        return examine(str(config), overrides, role="baseline", images=2, console=Console(quiet=True))

    assert "2 of 2 epochs done -> train with --resume" in found(look(), "warning", "output")[0]
    (text,) = found(look("optimizer.lr=0.5"), "problem")
    assert "cannot be resumed" in text and "optimizer.lr (0.01 -> 0.5)" in text
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before
    assert "is free" in found(look(f"output={tmp_path}/new/deep"), "ok", "output")[0]
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "baseline").touch()
    assert "is a file, not a folder" in found(look(f"output={tmp_path}/file"), "problem")[0]


def test_optimizer_hints(tmp_path):
    report = doctor(
        tmp_path,
        "optimizer.lr=0.1",
        "optimizer.warmup=5",
        "optimizer.schedule=multistep",
        "optimizer.milestones=[1,8]",
        role="baseline",
    )
    rate, milestones, warmup = found(report, "warning", "optimizer")
    assert "40.0 times" in rate and "optimizer.lr=0.0025" in rate
    assert "milestones 8 are not reached in 2 epochs" in milestones
    assert "5 steps of warm-up in a run of 6" in warmup and not report.status
