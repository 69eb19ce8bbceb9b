from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from train.recipe import tree

from tardkd import cli
from tardkd.demo import demo
from tardkd.train import checkpoint
from tardkd.train.config import parse_config
from tardkd.train.folder import claim


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A recipe still smaller than --quick, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "demo_recipe", lambda: {**tree(tmp_path), "output": None})
    monkeypatch.setattr(demo, "QUICK", ("data.train=4", "train.epochs=2"))


def test_demo(small, tmp_path, capsys):
    """All of it."""
    assert cli.main(["demo", "--quick", "--seeds", "2"]) == 0
    out = tmp_path / "runs" / "demo"
    results = json.loads((out / "results.json").read_text())
    for role in ("teacher", "baseline", "distilled"):
        values = [seed[role]["AP"] for seed in results["seeds"]]
        assert results[role]["AP"] == pytest.approx(sum(values) / 2)
        assert (results["std"][role]["AP"] is None) == (role == "teacher")  # the seeds share one teacher
        for seed in results["seeds"]:
            assert 0 < seed[role]["cpu_seconds"] < results["cpu_seconds"]
            assert 0 < seed[role]["seconds"] < results["seconds"]
    folders = {str(path.parent.relative_to(out)) for path in out.glob("seed*/*/last.pt")}
    assert folders == {"seed0/teacher", *(f"seed{i}/{role}" for i in (0, 1) for role in ("baseline", "distilled"))}
    assert [row["epoch"] for row in results["seeds"][0]["gates"]] == [1, 2]
    assert results["seeds"][0]["gates"][0]["lambda"] == 1 and results["settings"]["train"]["epochs"] == 2
    assert {path.name for path in out.iterdir()} == {"results.json", "curves.png", "detections.png", "seed0", "seed1"}
    shown = capsys.readouterr().out
    assert "AP in percent, 2 seeds" in shown and "distilled" in shown and "gain" in shown
    for name in ("teacher", "baseline 0", "baseline 1", "distilled 0", "distilled 1"):
        assert f"\n{name} epoch 2/2 AP " in f"\n{shown}"
    assert cli.main(["demo", "--out", "runs/demo", "--quick"]) == 2
    assert "holds an earlier demo" in capsys.readouterr().err
    claim(out, lambda held: "", overwrite=True, patterns=demo.OUTPUTS)
    assert not list(out.iterdir())


def test_a_training_beside_others_gives_the_weights_that_it_gives_alone(small, tmp_path):
    demo.run_demo(tmp_path / "demo", quick=True, console=Console(file=io.StringIO()))
    config = demo.demo_config(tmp_path / "demo", 0, quick=True).for_role("baseline")
    alone = parse_config({**config.plain(), "output": str(tmp_path / "alone")}, source="alone")
    demo.train(alone, console=Console(file=io.StringIO()))
    beside, alone = (checkpoint.load(path / "last.pt")["model"] for path in (Path(config.output), tmp_path / "alone"))
    assert all(beside[name].equal(alone[name]) for name in alone)


def test_an_error_of_a_training_reaches_the_command_line(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "QUICK", ("optimizer.lr=1e30",))
    assert cli.main(["demo", "--quick"]) == 2
    assert "loss is nan" in capsys.readouterr().err


def test_no_line_of_progress_is_longer_than_a_terminal_is_wide():
    line = "teacher epoch 1/6 " + "x" * 200
    shown = [io.StringIO(), io.StringIO()]
    for file, terminal in zip(shown, (True, False), strict=True):
        demo._say(Console(file=file, force_terminal=terminal, width=40, color_system=None), line)
    assert [file.getvalue() for file in shown] == [line[:39] + "…\n", line + "\n"]


def test_the_packaged_recipe_is_complete():
    config = demo.demo_config(Path("out"), 3, quick=False)
    assert config.train.seed == 3 and config.teacher.model is not None and config.distill.enabled
    assert config.train.threads == 1  # the trainings share the cores among them


def test_the_trainings_of_all_seeds_begin_with_those_that_wait_for_none():
    configs = {seed: demo.demo_config(Path("out"), seed, quick=True) for seed in range(2)}
    jobs = [(job.name, job.after) for job in demo.demo_jobs(configs)]
    assert jobs == [
        ("teacher", None),
        ("baseline 0", None),
        ("baseline 1", None),
        ("distilled 0", "teacher"),
        ("distilled 1", "teacher"),
    ]
    assert [job.name for job in demo.demo_jobs({0: configs[0]})] == ["teacher", "baseline", "distilled"]
