"""Pictures of runs: curves from their CSV logs, and detections of several models side by side."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.ops import box_iou

# Okabe and Ito's colours, which stay apart for colour-blind readers, as far as they go; then further ones.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#A5AA99", "#8C564B", "#F0E442")
LINES = ("-", "--", ":", "-.")
DISTILL = {"distill_feature": "feature", "distill_classification": "classification",
           "distill_regression": "regression", "distill_gaussian": "gaussian"}
GATES = {"gate_feature": "feature gate", "gate_classification": "classification gate",
         "gate_regression": "regression gate"}

Table = dict[str, np.ndarray]  # column name to values; NaN where a cell is empty


def plot_curves(runs: Mapping[str, str | Path], out: str | Path) -> None:
    """Draws the runs against each other over their epochs, into the picture file ``out``.

    Args:
        runs: name to run folder (or a file in it); reads its ``train.csv`` (columns epoch and step from 1, loss_* and
            distill_* per step, gate_* and lambda) and ``eval.csv`` (epoch, AP, AP50, ...).
    """
    tables = {name: _read_run(Path(path)) for name, path in runs.items()}
    distilled = {name: steps for name, (steps, _) in tables.items() if _columns(steps, DISTILL)}
    figure = Figure(figsize=(11, 7.5 if distilled else 4), layout="constrained")
    panels = figure.subplots(2 if distilled else 1, 2, squeeze=False).ravel()
    for i, (name, (steps, evaluations)) in enumerate(tables.items()):
        colour = COLOURS[i % len(COLOURS)]
        terms = [steps[key] for key in steps if key.startswith("loss_")]
        if terms:
            _curve(panels[0], steps, sum(terms), color=colour, label=name)
        for key, style in (("AP", ".-"), ("AP50", ":")):
            panels[1].plot(evaluations["epoch"], evaluations[key], style, color=colour, label=f"{name} {key}")
    panels[0].set(title="detector loss (moving mean)", ylabel="loss", ylim=(0, None))
    panels[1].set(title="average precision", ylabel="percent", ylim=(0, None))
    for (name, steps), line in zip(distilled.items(), LINES * len(distilled), strict=False):
        suffix = f" ({name})" if len(distilled) > 1 else ""
        for colour, key in zip(COLOURS, _columns(steps, DISTILL), strict=False):
            _curve(panels[2], steps, steps[key], color=colour, linestyle=line, label=DISTILL[key] + suffix)
        for colour, key in zip(COLOURS, _columns(steps, GATES), strict=False):
            _curve(panels[3], steps, steps[key], color=colour, linestyle=line, label=GATES[key] + suffix)
        if "lambda" in steps:
            panels[3].plot(_epochs(steps), steps["lambda"], color="black", linewidth=1, linestyle=line,
                           label="schedule weight" + suffix)
    if distilled:
        panels[2].set(title="distillation terms, weighted (moving mean)", ylabel="loss", ylim=(0, None))
        panels[3].set(title="foreground regions with open gates, and schedule", ylabel="share", ylim=(0, 1.02))
    for panel in panels:
        panel.set(xlabel="epoch", xlim=(0, None))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if panel.get_lines():
            panel.legend(fontsize=8, frameon=False)
    _save(figure, out)


def draw_detections(images: Tensor | Sequence[Tensor], columns: Mapping[str, Any], class_names: Sequence[str],
                    out: str | Path, *, min_score: float = 0.5) -> None:
    """Draws one row per image and one column per model into the picture file ``out``.

    Args:
        images: (3, H, W) uint8 or float in [0, 1]; one, or a sequence.
        columns: heading to one dict per image (the dict itself for one image): boxes (D, 4) xyxy in pixels, labels
            (D,) 1..K and scores (D,). A column without scores is ground truth: where there is one, detections
            that meet none of its objects (same class, IoU at least 0.5) are dashed, and objects missed are dotted
            white in the models' columns.
        min_score: detections below it are not drawn.
    """
    if isinstance(images, Tensor):
        images, columns = [images], {name: [boxes] for name, boxes in columns.items()}
    for name, per_image in columns.items():
        if len(per_image) != len(images):
            raise ValueError(f"column {name!r} has {len(per_image)} entries for {len(images)} images")
    truth = next((per_image for per_image in columns.values() if all("scores" not in entry for entry in per_image)),
                 None)
    height, width = images[0].shape[-2:]
    cell = 3.2
    figure = Figure(figsize=(cell * len(columns), cell * height / width * len(images) + 0.7), layout="constrained")
    panels = figure.subplots(len(images), len(columns), squeeze=False)
    for row, image in enumerate(images):
        for panel, (name, per_image) in zip(panels[row], columns.items(), strict=True):
            entry = {key: value.detach().cpu() for key, value in per_image[row].items() if isinstance(value, Tensor)}
            _draw_image(panel, image)
            if row == 0:
                panel.set_title(name, fontsize=12)
            if "scores" not in entry:
                _draw_boxes(panel, entry["boxes"], entry["labels"])
                continue
            keep = entry["scores"] >= min_score
            boxes, labels, scores = entry["boxes"][keep], entry["labels"][keep], entry["scores"][keep]
            right = torch.ones(len(boxes), dtype=torch.bool)
            if truth is not None:
                right, missed = _match(boxes, labels, truth[row]["boxes"].cpu(), truth[row]["labels"].cpu())
                for box in truth[row]["boxes"].cpu()[missed].tolist():
                    _rectangle(panel, box, "white", ":", 1.4)
            _draw_boxes(panel, boxes, labels, scores, right)
    used = sorted({int(label) for per_image in columns.values() for entry in per_image for label in entry["labels"]})
    handles = [Line2D([], [], color=_class_colour(label), linewidth=3, label=class_names[label - 1]) for label in used]
    if truth is not None:
        handles += [Line2D([], [], color="grey", linestyle="--", label="wrong"),
                    Line2D([], [], color="grey", linestyle=":", label="missed (white)")]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 3 * len(columns)),
                      frameon=False)
    _save(figure, out)


# ---- curves --------------------------------------------------------------------------------------------------------

def _read_run(path: Path) -> tuple[Table, Table]:
    folder = path if path.is_dir() else path.parent
    return _read_table(folder / "train.csv"), _read_table(folder / "eval.csv")


def _read_table(path: Path) -> Table:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows to plot")
    return {key: np.array([float(row[key] or "nan") for row in rows]) for key in rows[0]}


def _columns(table: Table, wanted: Mapping[str, str]) -> list[str]:
    return [key for key in wanted if key in table and np.isfinite(table[key]).any()]


def _epochs(steps: Table) -> np.ndarray:
    """Position of every step in epochs, 1 at the end of the first."""
    per_epoch = steps["step"][steps["epoch"] == steps["epoch"][0]].max() / steps["epoch"][0]
    return steps["step"] / per_epoch


def _curve(panel: Axes, steps: Table, values: np.ndarray, **style: Any) -> None:
    """``values`` over the epochs as a moving mean over 3 % of the run, so that noise leaves the course visible."""
    known = np.isfinite(values)
    values, epochs = values[known], _epochs(steps)[known]
    window = max(1, len(values) * 3 // 100)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    panel.plot(epochs[window - 1:], (sums[window:] - sums[:-window]) / window, linewidth=1.4, **style)


# ---- detections ----------------------------------------------------------------------------------------------------

def _draw_image(panel: Axes, image: Tensor) -> None:
    panel.imshow(image.detach().cpu().permute(1, 2, 0).numpy(), interpolation="lanczos")
    panel.set(xticks=[], yticks=[])
    panel.autoscale(False)


def _draw_boxes(panel: Axes, boxes: Tensor, labels: Tensor, scores: Tensor | None = None,
                right: Tensor | None = None) -> None:
    for i, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
        solid = right is None or bool(right[i])
        _rectangle(panel, box, _class_colour(label), "-" if solid else (0, (3, 2)), 1.8)
        if scores is not None:
            top = panel.get_ylim()[0] * 0.05  # a tag above a box at the upper edge would be cut off
            panel.text(max(box[0], 0), max(box[1], top), f"{100 * scores[i]:.0f}", fontsize=6, color="white",
                       va="bottom", clip_on=True,
                       bbox={"facecolor": _class_colour(label), "edgecolor": "none", "pad": 0.8})


def _rectangle(panel: Axes, box: Sequence[float], colour: str, line: Any, width: float) -> None:
    x1, y1, x2, y2 = box
    # Pixel i spans [i, i + 1] in box coordinates, but [i - 0.5, i + 0.5] in the picture's.
    # The dark rim keeps every colour apart from every ground.
    rim = patheffects.withStroke(linewidth=width + 0.8, foreground="black", alpha=0.7)
    panel.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linestyle=line,
                              linewidth=width, path_effects=[rim]))


def _class_colour(label: int) -> str:
    return COLOURS[(label - 1) % len(COLOURS)]


def _match(boxes: Tensor, labels: Tensor, true_boxes: Tensor, true_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which detections (D,), best first, meet an object that none before them met; which objects (G,) are missed."""
    fits = box_iou(boxes.float(), true_boxes.float()) * (labels[:, None] == true_labels[None, :])
    right = torch.zeros(len(boxes), dtype=torch.bool)
    missed = torch.ones(len(true_boxes), dtype=torch.bool)
    for i, row in enumerate(fits):
        row = torch.where(missed, row, 0)
        if len(row) and row.max() >= 0.5:
            right[i] = True
            missed[row.argmax()] = False
    return right, missed


def _save(figure: Figure, out: str | Path) -> None:
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
