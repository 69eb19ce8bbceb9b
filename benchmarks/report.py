"""pytest-benchmark's JSON as a Markdown report with plots.

    python benchmarks/report.py RESULTS.json --out FOLDER

Writes report.md and beside it ratios.png, roofline.png and growth.png, as far as there is something to show. Knows
nothing but the JSON: what ``record.py``, ``timing.py`` and ``roofline.py`` put into ``extra_info``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
OURS = "tardkd"


# --- reading -------------------------------------------------------------------------------------------------------


def read(results: dict) -> list[Row]:
    """One row a benchmark: its ``extra_info`` and ``seconds``, on the device where that is known, else the wall's."""
    rows = []
    for benchmark in results["benchmarks"]:
        info, stats = benchmark["extra_info"], benchmark["stats"]
        if "op" in info:
            wall = stats["median"]
            spread = stats["iqr"] / wall
            seconds = info.get("device_seconds", wall)
            rows.append({**info, "wall_seconds": wall, "spread": spread, "rounds": stats["rounds"], "seconds": seconds})
    return rows


def place(row: Row) -> tuple:
    """What two rows must share to be compared."""
    return tuple(row.get(key) for key in ("op", "case", "gate", "sizes", "threads", "curve", "value"))


def pairs(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Every rival's row with tardkd's of the same place."""
    rows = list(rows)
    ours = {place(row): row for row in rows if row["side"] == OURS}
    return [(ours[place(row)], row) for row in rows if row["side"] != OURS and place(row) in ours]


# --- tables --------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return [*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows), ""]


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def mebibytes(count: float | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f}"


def ratio(numerator: float, denominator: float) -> str:
    return f"{numerator / denominator:.3g}" if denominator else ""


def describe_run(results: dict, rows: Sequence[Row]) -> list[str]:
    facts = {key: sorted({str(row[key]) for row in rows}) for key in ("device", "tardkd", "torch", "torchvision")}
    cpu = results.get("machine_info", {}).get("cpu", {})
    facts["CPU"] = [f"{cpu.get('brand_raw', 'unknown')}, {cpu.get('count', '?')} logical cores"]
    facts["threads"] = sorted({str(row["threads"]) for row in rows if "curve" not in row})
    commit = results.get("commit_info", {})
    facts["commit"] = [f"{commit.get('id', 'unknown')}{', with changes' if commit.get('dirty') else ''}"]
    facts["time"] = [results.get("datetime", "unknown")]
    return [f"- {key}: {', '.join(values)}" for key, values in facts.items()] + [""]


def ratio_tables(rows: Sequence[Row]) -> list[str]:
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows):
        found = pairs(row for row in rows if row["op"] == op and "curve" not in row)
        if not found:
            continue
        lines += [f"### `{op}`", ""]
        for sizes in dict.fromkeys(ours["sizes"] for ours, _ in found):
            lines += [sizes[:1].upper() + sizes[1:] + ".", ""]
            lines += table(
                (
                    *("on", "gate", "rival", "tardkd, ms", "±", "rival, ms", "±", "ratio"),
                    *("extra memory, MiB", "rival's, MiB"),
                ),
                (
                    (
                        rival["case"],
                        rival["gate"],
                        rival["side"],
                        milliseconds(rival["our_seconds"]),
                        f"{rival['our_spread'] / 2:.0%}",
                        milliseconds(rival["seconds"]),
                        f"{rival['spread'] / 2:.0%}",
                        ratio(rival["seconds"], rival["our_seconds"]),
                        mebibytes(ours.get("peak_extra_bytes")),
                        mebibytes(rival.get("peak_extra_bytes")),
                    )
                    for ours, rival in found
                    if ours["sizes"] == sizes
                ),
            )
    return lines


def device_table(rows: Sequence[Row]) -> list[str]:
    """Host and device apart, for what ran on a GPU."""
    header = ("op", "on", "gate", "side", "device, ms", "host, ms", "wall, ms", "launches", "waits for the device")
    return table(
        header,
        (
            (
                f"`{row['op']}`",
                row["case"],
                row["gate"],
                row["side"],
                milliseconds(row["device_seconds"]),
                milliseconds(row["host_seconds"]),
                milliseconds(row["wall_seconds"]),
                row["launches"],
                row["synchronisations"],
            )
            for row in rows
        ),
    )


def roofline_table(rows: Sequence[Row]) -> list[str]:
    header = ("op", "on", "gate", "bytes, MiB", "operations, G", "copy, GB/s", "floor, ms", "time, ms", "share")
    return table(
        header,
        (
            (
                f"`{row['op']}`",
                row["case"],
                row["gate"],
                mebibytes(row["bytes"]),
                f"{row['operations'] / 1e9:.3g}",
                f"{row['copy_bytes_per_second'] / 1e9:.0f}",
                milliseconds(row["floor_seconds"]) + (" (memory)" if memory_bound(row) else " (operations)"),
                milliseconds(row["seconds"]),
                f"{row['share_of_floor']:.0%}",
            )
            for row in rows
        ),
    )


ALONE = "student alone"


def over_alone(row: Row, name: str) -> list[float]:
    """Quartiles of the ratio to the student's own step of the same round."""
    ratios = [time / alone for time, alone in zip(row["seconds_of"][name], row["seconds_of"][ALONE])]
    return statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else 3 * ratios


def step_table(row: Row) -> list[str]:
    return [
        f"### On {row['case']}",
        "",
        f"Student {row['training_step']}; untrained, 512 regions an image. A step: forward, backward and SGD; medians",
        f"of {len(row['seconds_of'][ALONE])} rounds in which all took turns, and the middle half of what they say.",
        "",
        *table(
            ("step", "ms", "over the student alone", "middle half"),
            (
                (name, milliseconds(statistics.median(seconds)), f"{ratio:.3f}", f"{low:.3f} to {high:.3f}")
                for name, seconds in row["seconds_of"].items()
                for low, ratio, high in [over_alone(row, name)]
            ),
        ),
    ]


# What is wanted on the (CPU, GPU): of the main sizes, in float32 and NCHW.
RATIOS = (
    (
        "flagship / torchvision + PyTorch, eager, all open",
        "region_distill_loss",
        "all",
        ("eager", "subtracted"),  # the better of the two
        (10, 20),
    ),
    ("flagship / the same compiled, all open", "region_distill_loss", "all", ("compiled",), (8, 10)),
    (
        "flagship / the best that pools only open regions, gates as in training",
        "region_distill_loss",
        "either",
        ("filtered", "filtered compiled", "subtracted filtered"),
        (5, 8),
    ),
    ("`pooled_distill_loss` / eager, all open", "pooled_distill_loss", "all", ("eager",), (5, 5)),
    ("`pooled_distill_loss` / compiled, all open", "pooled_distill_loss", "all", ("compiled",), (2, 2)),
    ("`pooled_distill_loss` / eager, gates as in training", "pooled_distill_loss", "either", ("eager",), (5, 5)),
    ("`pooled_distill_loss` / compiled, gates as in training", "pooled_distill_loss", "either", ("compiled",), (2, 2)),
    ("`multiscale_roi_align` / torchvision's", "multiscale_roi_align", "", ("torchvision",), (4, 5)),
    ("`gaussian_feature_loss` / eager", "gaussian_feature_loss", "", ("eager",), (4, 6)),
    ("`gaussian_feature_loss` / compiled", "gaussian_feature_loss", "", ("compiled",), (1.5, 1.5)),
)


def target_table(rows: Sequence[Row], training: Sequence[Row], device: str) -> list[str]:
    """What is wanted of the library beside what this run measured; nothing where nothing was measured."""
    on_gpu = device == "cuda"
    main = [row for row in rows if row["case"] == f"{device} float32 NCHW" and "curve" not in row]
    main = [row for row in main if row["sizes"] == main[0]["sizes"]]
    lines = []

    def add(what: str, wanted: str, value: float, form: str, met: bool) -> None:
        lines.append((what, wanted, form.format(value), "yes" if met else "**no**"))

    for what, op, gate, sides, wanted in RATIOS:
        of_op = [row for row in main if (row["op"], row["gate"]) == (op, gate) and row["side"] in sides]
        if of_op:
            value = min(row["seconds"] / row["our_seconds"] for row in of_op)
            add(what, f"≥ {wanted[on_gpu]}x", value, "{:.1f}x", value >= wanted[on_gpu])
    for row in main:
        if "share_of_floor" in row:
            what = " ".join(filter(None, (f"`{row['op']}`", row["gate"], "share of its floor")))
            share = row["share_of_floor"]
            add(what, "≥ 60 %" if on_gpu else "stated", share, "{:.0%}", share >= 0.6 * on_gpu)
    for row in main:
        if "gradient_bytes" in row and "peak_extra_bytes" in row:
            value = row["peak_extra_bytes"] / row["gradient_bytes"]
            add(f"flagship, {row['gate']}: peak extra memory / gradients", "≤ 1.02", value, "{:.3f}", value <= 1.02)
    for row in training:
        if row["case"] == device:
            cost = over_alone(row, "tardkd, teacher remembered")[1] - 1
            add("distillation over the student's step, teacher apart", "≤ 3 %", cost, "{:.1%}", cost <= 0.03)
            whole = over_alone(row, "tardkd")[1]
            wanted = "≤ 1.35" if on_gpu else "stated"
            add("whole step / the student's", wanted, whole, "{:.2f}", whole <= 1.35 or not on_gpu)
    return table((f"on {device}", "wanted", "measured", "met"), lines) if lines else []


def memory_bound(row: Row) -> bool:
    return row["memory_floor_seconds"] == row["floor_seconds"]


def growth_tables(rows: Sequence[Row]) -> list[str]:
    lines = []
    for curve in dict.fromkeys(row["curve"] for row in rows):
        of_curve = [row for row in rows if row["curve"] == curve]
        sides = list(dict.fromkeys(row["side"] for row in of_curve))
        values = sorted({row["value"] for row in of_curve})
        found = {(row["value"], row["side"]): row for row in of_curve}

        def cells(value: float) -> list[str]:
            sides_of_value = [found.get((value, side), {}) for side in sides]
            times = [milliseconds(row.get("seconds")) for row in sides_of_value]
            return times + [mebibytes(row.get("peak_extra_bytes")) for row in sides_of_value]

        header = [curve, *(f"{side}, ms" for side in sides), *(f"{side}, MiB" for side in sides)]
        lines += table(header, ([value, *cells(value)] for value in values))
    return lines


# --- plots ---------------------------------------------------------------------------------------------------------


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def plot_ratios(found: Sequence[tuple[Row, Row]], path: Path) -> None:
    """A bar a rival: how many times as long it takes."""
    names = [" ".join(filter(None, (o["op"], r["case"], r["gate"], "vs", r["side"]))) for o, r in found]
    values = [rival["seconds"] / rival["our_seconds"] for _, rival in found]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(found)))
    bars = axes.barh(names, values, color=["tab:blue" if value >= 1 else "tab:red" for value in values])
    axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="time of the rival / time of tardkd")
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    save(figure, path)


def plot_roofline(rows: Sequence[Row], path: Path) -> None:
    """Performance over operational intensity, below each device's roof."""
    figure, axes = plt.subplots(figsize=(7, 5))
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        intensity = [row["operations"] / row["bytes"] for row in of_op]
        axes.scatter(intensity, [row["operations"] / row["seconds"] / 1e9 for row in of_op], label=op, zorder=3)
    low = min(row["operations"] / row["bytes"] for row in rows) / 4
    devices = {}
    for row in rows:
        devices.setdefault((row["case"].partition(" ")[0], row["threads"]), row)
    for (device, _), row in devices.items():
        bandwidth, rate = row["copy_bytes_per_second"], row["operations_per_second"]
        ridge = rate / bandwidth
        xs = [min(low, ridge / 4), ridge, 4 * ridge]
        axes.plot(xs, [min(rate, bandwidth * x) / 1e9 for x in xs], color="black", linewidth=1)
        axes.annotate(device, (ridge, rate / 1e9), textcoords="offset points", xytext=(0, 4))
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="G operations a second")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    save(figure, path)


def plot_growth(rows: Sequence[Row], path: Path) -> None:
    """Time above, memory below; a column a curve."""
    curves = list(dict.fromkeys(row["curve"] for row in rows))
    figure, grid = plt.subplots(2, len(curves), figsize=(3.2 * len(curves), 6), squeeze=False)
    for column, curve in zip(grid.T, curves):
        for axes, key, unit, label in (
            (column[0], "seconds", 1e-3, "time, ms"),
            (column[1], "peak_extra_bytes", 2**20, "extra memory, MiB"),
        ):
            of_curve = sorted((row for row in rows if row["curve"] == curve and key in row), key=lambda r: r["value"])
            for side in dict.fromkeys(row["side"] for row in of_curve):
                of_side = [row for row in of_curve if row["side"] == side]
                axes.plot([r["value"] for r in of_side], [r[key] / unit for r in of_side], marker="o", label=side)
            axes.set(xlabel=curve, ylabel=label)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
    grid[0, 0].legend(fontsize=8)
    figure.tight_layout()
    save(figure, path)


# --- report --------------------------------------------------------------------------------------------------------

INTRODUCTION = """
Medians, forward and backward together; on a GPU of the time on the device, by events, on the CPU of the wall's.

- Ratio: time of the rival by tardkd's, the two run in turn; above 1 tardkd is faster. ±: half the interquartile range
  by the median. A step ends when its gradients are freed.
- `filtered`: pools, or compares, only regions whose feature gate is open.
- `subtracted`: pools the difference of the two pyramids.
- `pooled`: losses on regions that the box heads have pooled anyway, so it does less.
- `imitation`, `correlation`: losses over whole maps; other work, for scale.
- Extra memory: the most held beyond the inputs, gradients included. On the CPU by the resident set of the process,
  which misses what malloc had kept.
"""
STEPS = """
- `tardkd`: the distiller with what the box heads have pooled; `pyramids pooled`: with `region_distill_loss` instead.
- `teacher remembered`: the teacher's outputs are those of the first step, so that only the distillation itself is
  added.
- `PyTorch`: the same losses in plain PyTorch, the teacher's head on foreground regions only here too; `whole teacher`:
  it predicts as well, as whoever calls `teacher(images)` has it.
"""
ROOFLINE = """
- Bytes: what must be read and written once: pixels that open regions touch, and whole gradients.
- Operations: of the separable form of RoIAlign.
- Floor: the larger of bytes at the machine's copy bandwidth and operations at the rate of its fp32 matrix product, both
  measured in the same run. A share above 100 % means that caches held some of it.
"""


def write_report(results: dict, folder: Path) -> str:
    """Writes everything; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = read(results)
    training = [b["extra_info"] for b in results["benchmarks"] if "training_step" in b["extra_info"]]
    if not rows:
        raise SystemExit("no result of benchmarks/ in there")
    lines = ["# Benchmarks", "", *describe_run(results, rows), INTRODUCTION.strip(), ""]
    if any(row.get("quick") for row in rows):
        lines += ["**Of tiny inputs (`--quick`): the times mean nothing.**", ""]

    if targets := [line for device in ("cuda", "cpu") for line in target_table(rows, training, device)]:
        lines += ["## What is wanted, and what came out", "", *targets]
    found = pairs(row for row in rows if "curve" not in row)
    if found:
        plot_ratios(found, folder / "ratios.png")
        lines += ["## Ratios", "", *ratio_tables(rows), "![ratios](ratios.png)", ""]
    if training:
        lines += ["## Training steps", "", STEPS.strip(), "", *(line for row in training for line in step_table(row))]
    if on_device := [row for row in rows if "device_seconds" in row and "curve" not in row]:
        lines += ["## Host and device", "", *device_table(on_device)]
    if limited := [row for row in rows if "floor_seconds" in row]:
        plot_roofline(limited, folder / "roofline.png")
        lines += ["## Roofline", "", ROOFLINE.strip(), "", *roofline_table(limited), "![roofline](roofline.png)", ""]
    if grown := [row for row in rows if "curve" in row]:
        plot_growth(grown, folder / "growth.png")
        lines += ["## Growth", "", *growth_tables(grown), "![growth](growth.png)", ""]
    text = "\n".join(lines).rstrip() + "\n"
    (folder / "report.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write_report(json.loads(arguments.results.read_text()), arguments.out)


if __name__ == "__main__":
    main()
