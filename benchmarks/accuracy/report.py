"""All results as a Markdown report with plots: gains paired by seed, with their 95 % intervals."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Result = dict[str, Any]
Place = tuple[str, str]  # data, pair
BASELINE, TEACHER, OURS = "alone", "teacher", "tardkd"
# The 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
QUANTILES = (
    12.71,
    4.30,
    3.18,
    2.78,
    2.57,
    2.45,
    2.36,
    2.31,
    2.26,
    2.23,
    2.20,
    2.18,
    2.16,
    2.14,
    2.13,
    2.12,
    2.11,
    2.10,
    2.09,
)


def read(folder: Path) -> list[Result]:
    """Every run's result under ``folder``."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.json"))]


def label(result: Result) -> str:
    """The method, with the factor of a search."""
    return result["method"] if result["factor"] == 1 else f"{result['method']} x{result['factor']:g}"


def by_seed(results: Iterable[Result], split: str) -> dict[Place, dict[str, dict[int, float]]]:
    """Average precision: place -> method -> seed -> AP; of the split "val" or "test"."""
    table: dict[Place, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        ap = result["AP"] if split == "val" else result.get("test", {}).get("AP")
        if ap is not None:
            table[result["data"], result["pair"]][label(result)][result["seed"]] = ap
    return table


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the mean; None of fewer than two values."""
    if len(values) < 2:
        return None
    quantile = QUANTILES[min(len(values) - 1, len(QUANTILES)) - 1]
    return quantile * statistics.stdev(values) / len(values) ** 0.5


def gains(of_method: dict[int, float], of_baseline: dict[int, float]) -> list[float]:
    """The differences of the seeds that both have."""
    return [of_method[seed] - of_baseline[seed] for seed in sorted(of_method.keys() & of_baseline.keys())]


def number(values: Sequence[float], *, signed: bool = False) -> str:
    """The mean and its interval."""
    if not values:
        return ""
    mean, half = f"{statistics.mean(values):{'+' if signed else ''}.1f}", interval(values)
    return mean if half is None else f"{mean} ± {half:.1f}"


def write_report(folder: Path) -> str:
    """Write ``report.md``, ``gains.png`` and ``time.png`` into the folder of the results; returns the text."""
    results = read(folder)
    if not results:
        raise FileNotFoundError(f"no results in {folder}")
    lines = [
        "# Accuracy",
        "",
        "Written by `python -m benchmarks.accuracy report` from the results beside it. Average precision in percent,",
        "of the last weights. A gain is the mean, over the seeds, of the difference to the student alone with the same",
        "seed; behind ± is half its 95 % interval (Student's t; none for one seed). Time is a core's, relative to the",
        "student alone. A method that ends in `xN` has N times its weight.",
        "",
        *(["[What they say, and what not](notes.md).", ""] if (folder / "notes.md").exists() else []),
        *_circumstances(results),
    ]
    for split, title in (("val", "Validation"), ("test", "Test")):
        table = by_seed(results, split)
        if table:
            lines += [f"## {title}", ""]
            lines += _means(table)
            for place in sorted(table):
                lines += _of_place(place, table[place], results)
    lines += _gates(results) + _pulls(results)
    lines += ["## Plots", "", "![gains](gains.png)", "", "![precision against time](time.png)", ""]
    text = "\n".join(lines)
    (folder / "report.md").write_text(text, encoding="utf-8")
    _plot_gains(by_seed(results, "val"), folder / "gains.png")
    _plot_time(results, folder / "time.png")
    return text


def _circumstances(results: Sequence[Result]) -> list[str]:
    versions = sorted({", ".join(f"{k} {v}" for k, v in result["versions"].items()) for result in results})
    commits = sorted({result["library"] for result in results})
    hours = sum(result["cpu_seconds"] for result in results) / 3600
    return [
        f"- {len(results)} runs, {hours:.1f} hours of a core",
        f"- {'; '.join(versions)}",
        f"- the library as of {', '.join(commits)}",
        "",
    ]


def _rows(methods: dict[str, dict[int, float]]) -> list[tuple[str, list[float]]]:
    """The methods with their gains, the best first; those without a seed of the student alone are left out."""
    found = [
        (name, gains(seeds, methods[BASELINE])) for name, seeds in methods.items() if name not in (BASELINE, TEACHER)
    ]
    return sorted((row for row in found if row[1]), key=lambda row: -statistics.mean(row[1]))


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
        "",
    ]


def _of_place(place: Place, methods: dict[str, dict[int, float]], results: Sequence[Result]) -> list[str]:
    seconds: dict[str, list[float]] = defaultdict(list)
    for result in results:
        if (result["data"], result["pair"]) == place:
            seconds[label(result)].append(result["cpu_seconds"])
    alone = statistics.mean(seconds[BASELINE]) if seconds[BASELINE] else None

    def row(name: str, difference: str) -> list[str]:
        time = f"{statistics.mean(seconds[name]) / alone:.2f}" if alone and name != TEACHER else ""
        return [name, str(len(methods[name])), number(list(methods[name].values())), difference, time]

    rows = [row(name, "") for name in (TEACHER, BASELINE) if name in methods]
    rows += [row(name, number(found, signed=True)) for name, found in _rows(methods)]
    return [f"### {place[0]}, {place[1]}", "", *_table(("method", "seeds", "AP", "gain", "time"), rows)]


def _means(table: dict[Place, dict[str, dict[int, float]]]) -> list[str]:
    """Mean gains over places, of methods that several have; beside each tardkd's default over the same places."""
    found: dict[str, dict[Place, float]] = defaultdict(dict)
    for place in table:
        for name, differences in _rows(table[place]):
            found[name][place] = statistics.mean(differences)
    ours_at = found.get(OURS, {})
    rows = []
    for name, gain in sorted(found.items(), key=lambda item: (-len(item[1]), -statistics.mean(item[1].values()))):
        shared = [ours_at[place] for place in gain if place in ours_at]
        ours = f"{statistics.mean(shared):+.1f}" if len(shared) == len(gain) else ""
        if len(gain) > 1:
            rows.append((name, len(gain), f"{statistics.mean(gain.values()):+.1f}", f"{min(gain.values()):+.1f}", ours))
    header = ("method", "data sets and pairs", "gain", "least", f"{OURS} there")
    return ["Mean over data sets and pairs, of whatever seeds there are:", "", *_table(header, rows)] if rows else []


def _gates(results: Sequence[Result]) -> list[str]:
    """What share of the foreground regions the gates opened for, in the first and in the last epoch."""
    rows = [
        (
            f"{result['data']}, {result['pair']}",
            label(result),
            *(f"{first[key]:.2f} to {last[key]:.2f}" for key in STATS),
        )
        for result in results
        if result["seed"] == 0
        for first, last in [(result["history"][0], result["history"][-1])]
        if all(key in last for key in STATS)
    ]
    text = "Shares of the foreground regions with an open gate, and both models' probability of the true class; seed 0."
    return ["## Gates", "", text, "", *_table(("on", "method", *STATS.values()), rows)] if rows else []


STATS = {
    "gate_feature": "features",
    "gate_classification": "classes",
    "gate_regression": "boxes",
    "teacher_score": "teacher's score",
    "student_score": "student's score",
}


def _pulls(results: Sequence[Result]) -> list[str]:
    """How strongly the terms pull, and what a balance has made of it."""
    rows = [
        (
            f"{result['data']}, {result['pair']}",
            label(result),
            term,
            f"{pull:.3g}",
            f"{result['factors'].get(f'distill_{term}', 1):.3g}",
        )
        for result in results
        if result["seed"] == 0
        for term, pull in result["pulls"].items()
    ]
    text = (
        "Gradient norm of a term at the student's features, over that of the detector's own losses, as the method's "
        "weights have it in the first steps; and the factor that a balance then gave the term. Seed 0."
    )
    return ["## Balance", "", text, "", *_table(("on", "method", "term", "pull", "factor"), rows)] if rows else []


# --- plots ---------------------------------------------------------------------------------------------------------


def _plot_gains(table: dict[Place, dict[str, dict[int, float]]], path: Path) -> None:
    places = [place for place in sorted(table) if table[place][BASELINE] and _rows(table[place])]
    if not places:
        return
    heights = [len(_rows(table[place])) for place in places]
    figure, axes = plt.subplots(
        len(places), figsize=(7, 1.2 * len(places) + 0.25 * sum(heights)), height_ratios=heights, squeeze=False
    )
    for axis, place in zip(axes[:, 0], places):
        rows = _rows(table[place])[::-1]
        for height, (name, found) in enumerate(rows):
            colour = "tab:blue" if name.startswith((OURS, "ours")) else "tab:gray"
            half = interval(found) or 0.0
            axis.errorbar(statistics.mean(found), height, xerr=half, fmt="o", color=colour, capsize=3)
        axis.set_yticks(range(len(rows)), [f"{name} ({len(found)})" for name, found in rows], fontsize=8)
        axis.axvline(0, color="black", linewidth=0.8)
        teacher = table[place].get(TEACHER)
        if teacher:
            axis.axvline(
                statistics.mean(teacher.values()) - statistics.mean(table[place][BASELINE].values()),
                color="tab:green",
                linestyle="--",
                linewidth=0.8,
                label="teacher",
            )
            axis.legend(fontsize=8)
        axis.set_title(f"{place[0]}, {place[1]}: gain in AP (seeds)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_time(results: Sequence[Result], path: Path) -> None:
    """Precision against time of the methods with their own weights; a dashed line is where the teacher has come to."""
    places = sorted({(result["data"], result["pair"]) for result in results if result["method"] == BASELINE})
    figure, axes = plt.subplots(len(places), figsize=(8, 4 * len(places)), squeeze=False)
    for axis, place in zip(axes[:, 0], places):
        curves: dict[str, list[list[dict]]] = defaultdict(list)
        for result in results:
            if (result["data"], result["pair"]) == place and result["factor"] == 1:
                curves[result["method"]].append(result["curve"])
        for curve in curves.pop(TEACHER, []):
            axis.axhline(curve[-1]["AP"], color="tab:green", linestyle="--", linewidth=0.8)
        colours = iter(plt.get_cmap("tab20").colors * 3)
        for name, found in sorted(curves.items(), key=lambda item: -statistics.mean(c[-1]["AP"] for c in item[1])):
            points = [
                (statistics.mean(p["cpu_seconds"] for p in ps), statistics.mean(p["AP"] for p in ps))
                for ps in zip(*found)
            ]
            style = {"color": "black"} if name == BASELINE else {"color": next(colours)}
            axis.plot(*zip(*points), label=name, marker=".", linewidth=2 if name == OURS else 1, **style)
        axis.set(title=f"{place[0]}, {place[1]}", xlabel="seconds of a core", ylabel="AP, validation")
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
