"""The demonstration: a teacher, the student alone and the distilled student on the built-in scenes, same budget."""

from __future__ import annotations

import csv
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from tardkd.seeing.curves import plot_curves
from tardkd.seeing.plots import draw_detections
from tardkd.train import checkpoint
from tardkd.train.build import build_dataset, load_student
from tardkd.train.config import Config, parse_config
from tardkd.train.evaluate import METRICS
from tardkd.train.folder import claim
from tardkd.train.loop import train
from tardkd.train.roles import ROLES

OUTPUTS = ("results.json", "curves.png", "detections.png", "seed[0-9]*")
QUICK = ("data.train=24", "data.val=12", "train.epochs=2", "train.log_every=6")
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

    The seeds share the one teacher, as one would in practice: they tell how far a student's score is luck. All runs
    have the same number of epochs and the same optimizer, both students of a seed the same first weights and the same
    images in the same order; last weights are compared, without choosing by the score.
    """
    console = console or Console()
    began = time.perf_counter()
    claim(out, _refusal(out), overwrite=overwrite, patterns=OUTPUTS)
    configs = {seed: demo_config(out, seed, quick=quick) for seed in range(seeds)}
    runs: list[dict[str, Any]] = []
    for seed, config in configs.items():
        values: dict[str, Any] = {"seed": seed}
        for role in ROLES:
            if role == "teacher" and runs:
                values[role] = runs[0][role]
                continue
            console.rule(f"seed {seed}: {role}")
            result = train(config.for_role(role), console=console, label=role)
            values[role] = {**{name: result.metrics[name] for name in METRICS}, "seconds": round(result.seconds, 1)}
        values["gates"] = gates_by_epoch(out / f"seed{seed}" / "distilled")
        runs.append(values)

    results = {
        **{role: {name: _mean([run[role][name] for run in runs]) for name in METRICS} for role in ROLES},
        "std": {
            role: {name: _std([run[role][name] for run in runs]) if role != "teacher" else None for name in METRICS}
            for role in ROLES
        },
        "seeds": runs,
        "seconds": round(time.perf_counter() - began, 1),
        "quick": quick,
        "threads": torch.get_num_threads(),
        "settings": configs[0].plain(),
    }
    _write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    plot_curves({role: out / "seed0" / role for role in ROLES}, out / "curves.png")
    draw_comparison(configs[0], out / "detections.png")
    console.print(results_table(results, seeds), gates_table(runs[0]["gates"]))
    console.print(
        f"{results['seconds']:.0f} s in all; {out}: results.json, curves.png, detections.png, and a folder "
        "for every run",
        highlight=False,
        soft_wrap=True,
    )
    return results


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
        model = load_student(checkpoint.load(path), path).eval()
        with torch.inference_mode():
            columns[role] = model([image.float() / 255 for image in images])
    draw_detections(images, columns, dataset.class_names, out)


def results_table(results: dict[str, Any], seeds: int) -> Table:
    """Fits 80 columns, spreads included."""
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
    for name in METRICS:
        table.add_column({"APs": "small", "APm": "medium", "APl": "large"}.get(name, name), justify="right")
    for role in ROLES:
        table.add_row(role, *(_cell(results[role][name], results["std"][role][name]) for name in METRICS))
    gains = {
        name: [
            run["distilled"][name] - run["baseline"][name]
            for run in results["seeds"]
            if run["distilled"][name] is not None
        ]
        for name in METRICS
    }
    table.add_section()
    table.add_row("gain", *(_cell(_mean(gain), _std(gain), signed=True) for gain in gains.values()))
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


def _cell(mean: float | None, std: float | None, *, signed: bool = False) -> str:
    if mean is None:
        return "-"
    return f"{mean:{'+' if signed else ''}.1f}" + (f"±{std:.1f}" if std is not None else "")


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _std(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def _refusal(out: Path) -> Callable[[list[str]], str]:
    return lambda held: f"{out} holds an earlier demo ({held[0]}); --overwrite removes it, or choose another --out"


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
