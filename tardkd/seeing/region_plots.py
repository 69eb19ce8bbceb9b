"""Pictures of what a teacher taught: a page for one image, and an overview of many.

A colour is a lesson (see ``tardkd.seeing.regions.LESSONS``) wherever regions are shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from tardkd.seeing.plots import class_handles, draw_image, draw_panel, draw_tags, literal, rectangle, save
from tardkd.seeing.regions import LESSONS, TaughtRegions

COLOURS = dict(zip(LESSONS, ("#808080", "#CC79A7", "#0072B2", "#D98200", "#009E73")))
MARKERS = dict(zip(LESSONS, ("x", "D", "^", "s", "o")))
SHOWN = 12  # regions on a page, classes in the overview
MIN_SCORE = 0.5  # detections below it are not drawn
CLOSED = (0, (1, 1.2))  # line of a region whose features are not taught

WIDTH, MARGIN, GAP = 12.0, 0.2, 0.25  # of a page, in inches
TABLE = 5.2  # width of the table beside the regions
ROW = 0.27  # height of a row of the table


def draw_page(
    image: Tensor,
    columns: Mapping[str, Mapping[str, Any]],
    regions: TaughtRegions,
    class_names: Sequence[str],
    out: str | Path,
    *,
    title: str,
    compared: str,
) -> None:
    """Objects, the student's and the teacher's detections; below them the regions that tell most, and their scores.

    Args:
        columns: "objects", "student" and "teacher": boxes, labels and, but for the objects, scores.
        compared: what the teacher's IoU had to beat: "region" or "student".
    """
    foreground = regions.foreground()
    shown = foreground.pick(SHOWN)
    aspect = image.shape[-2] / image.shape[-1]
    small = (WIDTH - 2 * MARGIN - 2 * GAP) / 3
    large = WIDTH - 2 * MARGIN - GAP - TABLE
    top, bottom = min(small * aspect, 5), max(min(large * aspect, 8), ROW * (SHOWN + 5))
    height = 0.95 + top + 0.85 + bottom + MARGIN
    figure = Figure(figsize=(WIDTH, height))

    def panel(x: float, y: float, width: float, tall: float) -> Axes:
        """Axes whose place is given in inches from the left and from the top."""
        return figure.add_axes((x / WIDTH, 1 - (y + tall) / height, width / WIDTH, tall / height))

    figure.text(MARGIN / WIDTH, 1 - 0.3 / height, title, fontsize=12, weight="bold")
    headings = {
        "objects": "objects",
        **{name: f"{name}'s detections, score at least {MIN_SCORE:.0%}" for name in ("student", "teacher")},
    }
    for i, (name, heading) in enumerate(headings.items()):
        ax = panel(MARGIN + i * (small + GAP), 0.75, small, top)
        draw_panel(ax, image, columns[name], columns["objects"], MIN_SCORE)
        ax.set_title(heading, loc="left", fontsize=10)
    used = sorted(
        {
            int(label)
            for entry in columns.values()
            for label, score in zip(entry["labels"], entry.get("scores", entry["labels"] * 0 + 1))
            if score >= MIN_SCORE
        }
    )
    figure.legend(
        handles=class_handles(used, class_names, with_truth=True),
        loc="upper left",
        ncols=len(used) + 2,
        bbox_to_anchor=(MARGIN / WIDTH, 1 - (0.78 + top) / height),
        borderaxespad=0,
        frameon=False,
        fontsize=9,
        columnspacing=1.6,
    )

    y = 0.95 + top + 0.6
    ax = panel(MARGIN, y, large, bottom)
    ax.set_anchor("NW")
    draw_image(ax, image)
    ax.set_title(_heading(len(shown), len(foreground)), loc="left", fontsize=10)
    colours = [COLOURS[lesson] for lesson in shown.lessons()]
    for box, colour, (feature, *_) in zip(shown.boxes.tolist(), colours, shown.gates.tolist()):
        rectangle(ax, box, colour, "-" if feature else CLOSED, 1.8)
    draw_tags(ax, shown.boxes.tolist(), [str(i) for i in range(1, len(shown) + 1)], colours, size=8, always=True)
    _draw_table(panel(MARGIN + large + GAP, y, TABLE, bottom), shown, foreground, class_names, compared)
    save(figure, out)


def draw_overview(
    taught: Sequence[TaughtRegions], class_names: Sequence[str], out: str | Path, *, compared: str
) -> None:
    """All foreground regions: the scores that decide the gates against each other, and the open gates per class."""
    parts = [regions.foreground() for regions in taught]
    labels, gates, scores = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("labels", "gates", "scores")
    )
    lessons = [lesson for part in parts for lesson in part.lessons()]
    figure = Figure(figsize=(13, 4.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _scatter(left, scores[:, 1], scores[:, 0], lessons, "student", "teacher", "probability of the true class")
    other = "student's box" if compared == "student" else "region itself (the proposal)"
    _scatter(middle, scores[:, 3], scores[:, 2], lessons, other, "teacher's box", "IoU with the object")
    _bars(right, labels, gates, class_names)
    total = Counter(lessons)
    handles = [
        Line2D([], [], color=COLOURS[name], marker=MARKERS[name], linestyle="", label=f"{name}: {total[name]}")
        for name in LESSONS
        if total[name]
    ]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=len(LESSONS),
        frameon=False,
        title=f"{len(lessons)} foreground regions of {len(taught)} images, by what the teacher taught there",
        alignment="left",
    )
    figure.supxlabel(
        "Above the diagonal the teacher is better: there the default gates teach the class (left) and "
        "the box (middle). Features are taught where one of the two is.",
        fontsize=8,
        color="0.35",
    )
    save(figure, out)


# ---- a page --------------------------------------------------------------------------------------------------------


def _heading(shown: int, foreground: int) -> str:
    if not foreground:
        return "no foreground region"
    if shown == foreground:
        return f"what was taught on all {foreground} foreground regions"
    return f"what was taught: {shown} of {foreground} foreground regions, where the two differ most"


def _draw_table(
    ax: Axes, shown: TaughtRegions, foreground: TaughtRegions, class_names: Sequence[str], compared: str
) -> None:
    """A row a region; the pair of numbers that opened a gate is bold."""
    ax.set_axis_off()
    ax.set(xlim=(0, TABLE), ylim=(ax.get_position().height * ax.figure.get_figheight(), 0))
    other = {"region": "P", "student": "S"}[compared]
    places = (0.45, 1.6, 2.75, 3.9)  # of class, probability, IoU, lesson
    for x, text in zip(places, ("class", "p:  S → T", f"IoU:  {other} → T", "taught")):
        ax.text(x, 0.1, text, fontsize=9, color="0.35", va="center")
    ax.plot([0, TABLE], [0.25, 0.25], color="0.7", linewidth=0.8)
    for i, (label, gates, scores, lesson) in enumerate(
        zip(shown.labels.tolist(), shown.gates.tolist(), shown.scores.tolist(), shown.lessons())
    ):
        y = 0.25 + ROW * (i + 0.6)
        ax.text(
            0.15,
            y,
            str(i + 1),
            fontsize=8,
            color="white",
            ha="center",
            va="center_baseline",
            bbox={"facecolor": COLOURS[lesson], "edgecolor": "none", "pad": 1.5},
        )
        ax.text(places[0], y, _short(class_names[label - 1]), fontsize=9, va="center_baseline")
        for x, (new, old), is_open in zip(places[1:], (scores[:2], scores[2:]), gates[1:]):
            ax.text(
                x,
                y,
                f"{old:.2f} → {new:.2f}",
                fontsize=9,
                va="center_baseline",
                weight="bold" if is_open else "normal",
                color="black" if is_open else "0.45",
            )
        ax.text(places[3], y, lesson, fontsize=9, va="center_baseline", color=COLOURS[lesson])
    y = 0.25 + ROW * (len(shown) + 0.3)
    ax.plot([0, TABLE], [y, y], color="0.7", linewidth=0.8)
    notes = [
        (
            f"p: probability of the true class, of student (S) and teacher (T). IoU with the object: of\n"
            f"{'the region itself (P)' if other == 'P' else 'the box of the student (S)'} and of the teacher's box. "
            "Bold: taught. Dotted box: features not taught."
        )
    ]
    if len(foreground):
        opened = zip(("features", "class", "box"), foreground.gates.sum(0).tolist())
        notes.insert(0, f"All {len(foreground)} regions: " + ", ".join(f"{name} {count}" for name, count in opened))
    ax.text(0, y + 0.12, "\n".join(notes), fontsize=8, color="0.35", va="top", linespacing=1.4)


def _short(name: str, length: int = 14) -> str:
    return literal(name if len(name) <= length else name[: length - 1] + "…")


# ---- the overview --------------------------------------------------------------------------------------------------


def _scatter(ax: Axes, x: Tensor, y: Tensor, lessons: Sequence[str], x_name: str, y_name: str, title: str) -> None:
    ax.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, zorder=0)
    for lesson in LESSONS:
        mine = torch.tensor([name == lesson for name in lessons], dtype=torch.bool)
        ax.scatter(x[mine], y[mine], s=16, alpha=0.7, linewidths=1, color=COLOURS[lesson], marker=MARKERS[lesson])
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel=x_name, ylabel=y_name)
    _plain(ax, title)


def _bars(ax: Axes, labels: Tensor, gates: Tensor, class_names: Sequence[str]) -> None:
    counts = Counter(labels.tolist()).most_common(SHOWN)
    for row, (label, _) in enumerate(counts):
        shares = gates[labels == label].float().mean(0).tolist()
        for i, (share, colour) in enumerate(zip(shares, ("0.3", COLOURS["class"], COLOURS["box"]))):
            ax.barh(row + 0.26 * (i - 1), share, height=0.24, color=colour)
    ax.set_yticks(
        range(len(counts)), [f"{_short(class_names[label - 1])}\nn = {count}" for label, count in counts], fontsize=9
    )
    ax.set(xlim=(0, 1.02), ylim=(max(len(counts), 1) - 0.5, -0.5), xlabel="share of its regions")
    _plain(ax, "open gates, by class")
    handles = [
        Line2D([], [], color=colour, linewidth=6, label=name)
        for name, colour in (("features", "0.3"), ("class", COLOURS["class"]), ("box", COLOURS["box"]))
    ]
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.45, -0.13),
        ncols=3,
        frameon=False,
        fontsize=9,
        handlelength=1,
        borderaxespad=0,
    )


def _plain(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=11)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
