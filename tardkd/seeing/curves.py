"""Runs compared over their epochs: one picture from their CSV logs, finished or not.

A colour is a run in all panels, a line style a quantity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tardkd.seeing.plots import COLOURS, literal, save
from tardkd.train.tables import read_table

COLUMNS = 3  # panels beside each other
WINDOW = 0.03  # share of a run's steps that the moving mean spans
LINES = ("-", (0, (4, 1.5)))

Table = dict[str, np.ndarray]  # column name to values; NaN where a cell is empty


@dataclass(frozen=True)
class Panel:
    """Columns of ``train.csv`` that share axes; each with what its line style is called."""

    title: str
    quantities: Mapping[str, str]
    limits: tuple[float, float | None] = (0, None)
    smooth: bool = True


DETECTOR = "detector loss, all parts"  # a column of our own: the sum of the loss_*, else the loss without the terms
PANELS = (
    Panel("detector loss, all parts", {DETECTOR: ""}),
    Panel("learning rate", {"lr": ""}, smooth=False),
    Panel("losses of the box head", {"loss_classifier": "class", "loss_box_reg": "box"}),
    Panel("losses of the proposals", {"loss_objectness": "object or not", "loss_rpn_box_reg": "box"}),
    Panel(
        "losses of a one-stage head",
        {"classification": "class", "bbox_regression": "box", "bbox_ctrness": "centerness"},
    ),
    Panel("norm of the gradient, before clipping", {"grad_norm": ""}),
    Panel("distillation: features, weighted", {"distill_feature": ""}),
    Panel("distillation: classes, weighted", {"distill_classification": ""}),
    Panel("distillation: boxes, weighted", {"distill_regression": ""}),
    Panel("distillation: Gaussian, weighted", {"distill_gaussian": ""}),
    Panel("regions with an open feature gate, share", {"gate_feature": ""}, limits=(0, 1.03)),
    Panel("regions with an open class gate, share", {"gate_classification": ""}, limits=(0, 1.03)),
    Panel("regions with an open box gate, share", {"gate_regression": ""}, limits=(0, 1.03)),
    Panel("probability of the true class", {"teacher_score": "teacher", "student_score": "student"}, (0, 1.03)),
    Panel("IoU with the object", {"teacher_iou": "teacher's box", "other_iou": "compared with"}, (0, 1.03)),
    Panel("schedule's weight lambda", {"lambda": ""}, limits=(0, 1.03), smooth=False),
)


def plot_curves(runs: Mapping[str, str | Path], out: str | Path) -> Path:
    """Draw the runs against each other over their epochs, into the picture file ``out`` (its ending says the format).

    Panels that no run has values for are left out; so a baseline has no gates, and takes part in the rest.

    Args:
        runs: name to run folder, or a file in it; reads its ``train.csv`` and ``eval.csv`` as far as they are written.

    Returns:
        The file that holds the picture: ``out``, or ``out`` with .png behind it if it has no ending.

    Raises:
        ValueError: a run has no log, no step in it yet, or a log that is damaged; names the file.
    """
    logs = {name: _read_run(Path(path)) for name, path in runs.items()}
    lengths = [length for steps, evaluations in logs.values() if (length := _epoch_length(steps, evaluations))]
    panels = [panel for panel in PANELS if any(_known(steps, panel.quantities) for steps, _ in logs.values())]
    rows = -(-(len(panels) + 1) // COLUMNS)
    figure = Figure(figsize=(13, 2.3 * rows + 1.1), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False, sharex=True).ravel()
    handles = []
    for i, (name, (steps, evaluations)) in enumerate(logs.items()):
        colour = COLOURS[i % len(COLOURS)]
        # Where even the first epoch is not over nobody knows its length but another run, of the same data if any.
        length = _epoch_length(steps, evaluations) or max(lengths, default=1)
        _draw_precision(axes[0], evaluations, length, colour)
        for ax, panel in zip(axes[1:], panels):
            for line, key in zip(LINES, panel.quantities):
                if _known(steps, [key]):
                    _curve(ax, steps["step"] / length, steps[key], panel.smooth, color=colour, linestyle=line)
        handles.append(Line2D([], [], color=colour, linewidth=3, label=literal(_summary(name, evaluations))))
    for ax, panel in zip(axes[1:], panels):
        _finish(ax, panel)
    axes[0].set_title("average precision, percent", loc="left", fontsize=10)
    axes[0].set_ylim(0, None)
    _style_legend(axes[0], ("AP", "AP50"))
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8, labelbottom=True)
        ax.set_xlim(0, None)
    for ax in axes[len(panels) + 1 :]:
        ax.remove()
    for ax in axes[: len(panels) + 1][-COLUMNS:]:
        ax.set_xlabel("epoch" if lengths else "step of the first epoch", fontsize=9)
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 3), frameon=False, fontsize=10)
    figure.supxlabel(
        f"Losses, gates and scores of steps: moving mean over {WINDOW:.0%} of the steps that a run has "
        "made. Gates and scores: means over the foreground regions.",
        fontsize=8,
        color="0.35",
    )
    return save(figure, out)


def unique_names(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Run folders by name: the last part of the path, with as many more as it takes to tell the runs apart."""
    folders = list(dict.fromkeys(Path(path).resolve() for path in paths))

    def name(folder: Path, parts: int) -> str:
        return "/".join(folder.parts[-parts:])

    names: dict[str, Path] = {}
    for folder in folders:
        parts = 1
        while sum(name(folder, parts) == name(other, parts) for other in folders) > 1:
            parts += 1
        names[name(folder, parts)] = folder
    return names


# ---- logs ----------------------------------------------------------------------------------------------------------


def _read_run(path: Path) -> tuple[Table, Table]:
    folder = path.parent if path.is_file() else path
    if not (folder / "train.csv").is_file():
        inside = sorted(
            log.parent.relative_to(folder) for depth in ("*", "*/*") for log in folder.glob(f"{depth}/train.csv")
        )
        hint = f"; there are runs in it: {', '.join(map(str, inside))}" if inside else ""
        raise ValueError(f"{folder} is no run's folder: it has no train.csv{hint}")
    steps, evaluations = _read_table(folder / "train.csv"), _read_table(folder / "eval.csv")
    if not steps:
        raise ValueError(f"{folder / 'train.csv'} has no step to plot yet")
    losses = [values for key, values in steps.items() if key.startswith("loss_")]
    if not losses and "loss" in steps:
        losses = [steps["loss"], *(-values for key, values in steps.items() if key.startswith("distill_"))]
    return {**steps, **({DETECTOR: sum(losses)} if losses else {})}, evaluations


def _read_table(path: Path) -> Table:
    """Empty where the file is absent or has no row."""
    header, rows = read_table(path)
    return {key: np.array([float(row[i] or "nan") for row in rows]) for i, key in enumerate(header) if rows}


def _epoch_length(steps: Table, evaluations: Table) -> float | None:
    """Steps in an epoch; None while the first one runs."""
    if evaluations:
        return evaluations["step"][0] / evaluations["epoch"][0]
    over = steps["epoch"] < steps["epoch"][-1]
    return steps["step"][over].max() / steps["epoch"][over].max() if over.any() else None


def _known(table: Table, wanted: Any) -> bool:
    return any(key in table and np.isfinite(table[key]).any() for key in wanted)


# ---- drawing -------------------------------------------------------------------------------------------------------


def _draw_precision(ax: Axes, evaluations: Table, length: float, colour: str) -> None:
    for key, line, marker in (("AP", LINES[0], "o"), ("AP50", LINES[1], None)):
        if _known(evaluations, [key]):
            ax.plot(
                evaluations["step"] / length,
                evaluations[key],
                color=colour,
                linestyle=line,
                linewidth=1.4,
                marker=marker,
                markersize=3.5,
            )


def _curve(ax: Axes, epochs: np.ndarray, values: np.ndarray, smooth: bool, **style: Any) -> None:
    known = np.isfinite(values)
    values, epochs = values[known], epochs[known]
    window = max(1, int(len(values) * WINDOW)) if smooth else 1
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ax.plot(epochs[window - 1 :], (sums[window:] - sums[:-window]) / window, linewidth=1.3, **style)


def _finish(ax: Axes, panel: Panel) -> None:
    ax.set_title(panel.title, loc="left", fontsize=10)
    ax.set_ylim(*panel.limits)
    if len(panel.quantities) > 1:
        _style_legend(ax, panel.quantities.values())


def _style_legend(ax: Axes, names: Any) -> None:
    handles = [Line2D([], [], color="0.3", linestyle=line, label=name) for line, name in zip(LINES, names)]
    ax.legend(handles=handles, fontsize=8, frameon=False, handlelength=2.4)


def _summary(name: str, evaluations: Table) -> str:
    if not _known(evaluations, ["AP"]):
        return f"{name} (not evaluated yet)"
    return f"{name} (AP {evaluations['AP'][-1]:.1f} after epoch {evaluations['epoch'][-1]:.0f})"
