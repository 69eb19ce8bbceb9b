"""The demonstration: a teacher, the student alone and the distilled student on the built-in scenes, same budget."""

from __future__ import annotations

import csv
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from tardkd.demo.side_by_side import Job, Outcome, count_workers, run_side_by_side
from tardkd.files import FolderLock, write_text
from tardkd.seeing.curves import plot_curves
from tardkd.seeing.plots import draw_detections
from tardkd.train import checkpoint
from tardkd.train.build import build_dataset, load_student
from tardkd.train.config import Config, parse_config
from tardkd.train.evaluate import METRICS
from tardkd.train.folder import claim
from tardkd.train.loop import train
from tardkd.train.roles import ROLES, Role
from tardkd.train.terminal import patient_console

OUTPUTS = ("results.json", "curves.png", "detections.png", "seed[0-9]*")
QUICK = ("data.train=24", "data.val=12", "train.epochs=2", "train.log_every=3")
PICTURES = 4  # images drawn
SHARES = {  # columns of train.csv shown per epoch
    "lambda": "weight",
    "gate_feature": "feature",
    "gate_classification": "class",
    "gate_regression": "box",
    "teacher_score": "p(T)",
    "student_score": "p(S)",
    "teacher_iou": "IoU(T)",
    "other_iou": "IoU(P)",
}


def run_demo(
    out: Path, *, seeds: int = 1, quick: bool = False, overwrite: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Train a teacher, then both students for every seed, print what came out and write it to `out`/results.json.

    The trainings go on side by side, in as many processes as there are cores, at most four. The seeds share the one
    teacher, as one would in practice: they tell how far a student's score is luck. All runs have the same number of
    epochs and the same optimizer, both students of a seed the same first weights and the same images in the same order;
    last weights are compared, without choosing by the score.
    """
    with FolderLock(out) as lock:
        claim(out, _refusal(out), overwrite=overwrite, patterns=OUTPUTS, lock=lock)
        return _run(out, seeds, quick, console or patient_console())


def _run(out: Path, seeds: int, quick: bool, console: Console) -> dict[str, Any]:
    """The trainings of :func:`run_demo` in a folder of their own, and what they came to."""
    began, cpu_began = time.perf_counter(), cpu_seconds()
    configs = {seed: demo_config(out, seed, quick=quick) for seed in range(seeds)}
    workers = count_workers()
    outcomes = run_side_by_side(demo_jobs(configs), workers=workers, say=partial(_say, console))
    runs = [
        {
            "seed": seed,
            **{role: _scores(outcomes[job_name(role, seed, seeds)]) for role in ROLES},
            "gates": gates_by_epoch(out / f"seed{seed}" / "distilled"),
        }
        for seed in configs
    ]
    results = {
        **{role: {name: _mean([run[role][name] for run in runs]) for name in METRICS} for role in ROLES},
        "std": {
            role: {name: _std([run[role][name] for run in runs]) if role != "teacher" else None for name in METRICS}
            for role in ROLES
        },
        "seeds": runs,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(cpu_seconds() - cpu_began, 1),
        "quick": quick,
        "processes": workers,
        "threads": configs[0].train.threads,
        "settings": configs[0].plain(),
    }
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    plot_curves({role: out / "seed0" / role for role in ROLES}, out / "curves.png")
    draw_comparison(configs[0], out / "detections.png")
    console.print(results_table(results, seeds), gates_table(runs[0]["gates"]))
    console.print(
        f"{results['seconds']:.0f} s in all, {results['cpu_seconds']:.0f} s of CPU; "
        f"{out}: results.json, curves.png, detections.png, and a folder for every run",
        highlight=False,
        soft_wrap=True,
    )
    return results


def demo_jobs(configs: Mapping[int, Config]) -> list[Job]:
    """All trainings: first those that need nothing, the longest at the front, then those that need the teacher."""
    teacher = job_name("teacher", 0, len(configs))
    jobs = [Job(teacher, partial(_train, configs[0], "teacher", teacher))]
    for role, after in (("baseline", None), ("distilled", teacher)):
        for seed, config in configs.items():
            name = job_name(role, seed, len(configs))
            jobs.append(Job(name, partial(_train, config, role, name), after))
    return jobs


def job_name(role: Role, seed: int, seeds: int) -> str:
    """What the lines of a training begin with: its role, and of several seeds which; they share the teacher."""
    return role if role == "teacher" or seeds == 1 else f"{role} {seed}"


def demo_config(out: Path, seed: int, *, quick: bool) -> Config:
    overrides = [*(QUICK if quick else ()), f"train.seed={seed}", f"teacher.weights={out / 'seed0/teacher/last.pt'}"]
    return parse_config({**demo_recipe(), "output": str(out / f"seed{seed}")}, overrides, source="demo.yaml")


def demo_recipe() -> dict[str, Any]:
    return yaml.safe_load(resources.files("tardkd.demo").joinpath("demo.yaml").read_text(encoding="utf-8"))


def gates_by_epoch(folder: Path) -> list[dict[str, float]]:
    """The mean over each epoch of what the distiller said about its gates."""
    with open(folder / "train.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    epochs = sorted({int(row["epoch"]) for row in rows})
    return [
        {
            "epoch": epoch,
            **{
                name: statistics.fmean(float(row[name]) for row in rows if int(row["epoch"]) == epoch and row[name])
                for name in SHARES
            },
        }
        for epoch in epochs
    ]


def draw_comparison(config: Config, out: Path) -> None:
    """The first validation images with the true objects and what each of the three models finds."""
    dataset = build_dataset(config, "val")
    items = [dataset[i] for i in range(min(PICTURES, len(dataset)))]
    images = [image for image, _ in items]
    columns: dict[str, Any] = {"ground truth": [target for _, target in items]}
    for role in ROLES:
        path = Path(config.output) / role / "last.pt"
        model = load_student(checkpoint.load_trained(path), path).eval()
        with torch.inference_mode():
            columns[role] = model([image.float() / 255 for image in images])
    draw_detections(images, columns, dataset.class_names, out)


def results_table(results: dict[str, Any], seeds: int) -> Table:
    """Each metric's mean over the seeds with its spread, in 80 columns; one that counts no object is left out."""
    metrics = [name for name in METRICS if results["teacher"][name] is not None]
    seconds = ", ".join(
        f"{role} {statistics.fmean(run[role]['seconds'] for run in results['seeds']):.0f}" for role in ROLES
    )
    table = Table(
        title=f"AP in percent, {seeds} seed{'s' if seeds > 1 else ''}",
        caption=f"seconds: {seconds}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("")
    for name in metrics:
        table.add_column({"APs": "small", "APm": "medium", "APl": "large"}.get(name, name), justify="right")
    for role in ROLES:
        table.add_row(role, *(_cell(results[role][name], results["std"][role][name]) for name in metrics))
    gains = [[run["distilled"][name] - run["baseline"][name] for run in results["seeds"]] for name in metrics]
    table.add_section()
    table.add_row("gain", *(_cell(_mean(gain), _std(gain), signed=True) for gain in gains))
    return table


def gates_table(epochs: list[dict[str, float]]) -> Table:
    """What the gates opened over time, of the first seed."""
    table = Table(
        title="What the gates opened, by epoch of the first seed",
        caption=(
            "weight: of the schedule; feature, class, box: share of foreground regions with an open gate; p: mean "
            "probability of the true class, IoU: mean overlap with the object, of teacher, student and proposal"
        ),
    )
    table.add_column("epoch", justify="right")
    for title in SHARES.values():
        table.add_column(title, justify="right")
    for row in epochs:
        table.add_row(str(row["epoch"]), *(f"{row[name]:.2f}" for name in SHARES))
    return table


def cpu_seconds() -> float:
    """Of the processor's time, what this process and its children that have ended have used."""
    return sum(os.times()[:4])


def _train(config: Config, role: Role, name: str, console: Console) -> dict[str, float | None]:
    """One training, in a process of its own; the metrics of its last epoch."""
    result = train(config.for_role(role), console=console, label=name)
    return {metric: result.metrics[metric] for metric in METRICS}


def _scores(outcome: Outcome) -> dict[str, float | None]:
    return {**outcome.value, "seconds": round(outcome.seconds, 1), "cpu_seconds": round(outcome.cpu_seconds, 1)}


def _say(console: Console, line: str) -> None:
    """A line of progress; a terminal shows so much of it as fits, as the most important comes first."""
    room = {"no_wrap": True, "overflow": "ellipsis"} if console.is_terminal else {"soft_wrap": True}
    console.print(line, highlight=False, markup=False, **room)


def _cell(mean: float, std: float | None, *, signed: bool = False) -> str:
    return f"{mean:{'+' if signed else ''}.1f}" + (f"±{std:.1f}" if std is not None else "")


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _std(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def _refusal(out: Path) -> Callable[[list[str]], str]:
    return lambda held: f"{out} holds an earlier demo ({held[0]}); --overwrite removes it, or choose another --out"
