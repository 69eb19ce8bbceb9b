"""Boxes on images: what several models detect, side by side; and the parts of such pictures for others to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.ops import box_iou

from tardkd.files import replacing

# Okabe and Ito's colours, which stay apart for colour-blind readers, as far as they go; then further ones.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#A5AA99", "#8C564B", "#F0E442")


def draw_detections(
    images: Tensor | Sequence[Tensor],
    columns: Mapping[str, Any],
    class_names: Sequence[str],
    out: str | Path,
    *,
    min_score: float = 0.5,
) -> None:
    """Draw one row per image and one column per model into the picture file ``out``.

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
    truth = next(
        (per_image for per_image in columns.values() if all("scores" not in entry for entry in per_image)), None
    )
    height, width = images[0].shape[-2:]
    cell = 3.2
    figure = Figure(figsize=(cell * len(columns), cell * height / width * len(images) + 0.7), layout="constrained")
    panels = figure.subplots(len(images), len(columns), squeeze=False)
    for row, image in enumerate(images):
        for panel, (name, per_image) in zip(panels[row], columns.items(), strict=True):
            if row == 0:
                panel.set_title(literal(name), fontsize=12)
            draw_panel(panel, image, per_image[row], truth and truth[row], min_score)
    used = sorted({int(label) for per_image in columns.values() for entry in per_image for label in entry["labels"]})
    handles = class_handles(used, class_names, with_truth=truth is not None)
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(handles), 3 * len(columns)), frameon=False
        )
    save(figure, out)


# ---- parts ---------------------------------------------------------------------------------------------------------


def draw_panel(
    panel: Axes, image: Tensor, entry: Mapping[str, Any], truth: Mapping[str, Any] | None, min_score: float
) -> None:
    """One image with one model's boxes, or with its objects where ``entry`` has no scores."""
    draw_image(panel, image)
    entry = {key: value.detach().cpu() for key, value in entry.items() if isinstance(value, Tensor)}
    boxes, labels = entry["boxes"], entry["labels"]
    if "scores" not in entry:
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
            rectangle(panel, box, class_colour(label), "-", 1.8)
        return
    keep = entry["scores"] >= min_score
    boxes, labels, scores = boxes[keep], labels[keep], entry["scores"][keep]
    right = torch.ones(len(boxes), dtype=torch.bool)
    if truth is not None:
        right, missed = _match(boxes, labels, truth["boxes"].cpu(), truth["labels"].cpu())
        for box in truth["boxes"].cpu()[missed].tolist():
            rectangle(panel, box, "white", ":", 1.4)
    for box, label, solid in zip(boxes.tolist(), labels.tolist(), right.tolist(), strict=True):
        rectangle(panel, box, class_colour(label), "-" if solid else (0, (3, 2)), 1.8)
    draw_tags(
        panel,
        boxes.tolist(),
        [f"{100 * score:.0f}" for score in scores.tolist()],
        [class_colour(label) for label in labels.tolist()],
        size=6,
    )


def class_handles(labels: Sequence[int], class_names: Sequence[str], *, with_truth: bool) -> list[Line2D]:
    """A legend's lines for classes and, with ``with_truth``, for what :func:`draw_panel` makes of detections."""
    handles = [
        Line2D([], [], color=class_colour(label), linewidth=3, label=literal(class_names[label - 1]))
        for label in labels
    ]
    if with_truth:
        handles += [
            Line2D([], [], color="grey", linestyle="--", label="wrong"),
            Line2D([], [], color="grey", linestyle=":", label="missed (white)"),
        ]
    return handles


def literal(name: str) -> str:
    """A name as it is, where matplotlib would set what is between two dollars as a formula."""
    return name.replace("$", r"\$")


def draw_image(panel: Axes, image: Tensor) -> None:
    panel.imshow(image.detach().cpu().permute(1, 2, 0).numpy(), interpolation="lanczos")
    panel.set(xticks=[], yticks=[])
    panel.autoscale(False)


def draw_tags(
    panel: Axes,
    boxes: Sequence[Sequence[float]],
    texts: Sequence[str],
    colours: Sequence[str],
    *,
    size: float,
    always: bool = False,
) -> None:
    """A text at a corner of each box, where it hides no earlier one; without room it is left out unless ``always``."""
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    extent = panel.get_window_extent()
    # Pixels of the image to a typographic point; the layout makes the panel larger rather than smaller later.
    unit = max((right - left) / extent.width, (bottom - top) / extent.height) * panel.figure.dpi / 72
    taken: list[tuple[float, float]] = []
    height = 1.35 * size * unit
    spans: list[float] = []
    for (x1, y1, x2, y2), text, colour in zip(boxes, texts, colours, strict=True):
        width = (0.66 * len(text) + 0.4) * size * unit
        corners = [
            (x1, y1 - height),
            (x2 - width, y1 - height),
            (x1, y2),
            (x2 - width, y2),
            (x1, y1),
            (x2 - width, y2 - height),
        ]
        corners = [(min(max(x, left), right - width), min(max(y, top), bottom - height)) for x, y in corners]

        def hidden(corner: tuple[float, float]) -> float:
            return sum(
                max(0.0, min(corner[0] + width, x + span) - max(corner[0], x)) * max(0.0, height - abs(corner[1] - y))
                for (x, y), span in zip(taken, spans)
            )

        best = min(corners, key=hidden)
        if hidden(best) > 0 and not always:
            continue
        taken.append(best)
        spans.append(width)
        panel.text(
            best[0] + width / 2,
            best[1] + height / 2,
            text,
            fontsize=size,
            color="white",
            ha="center",
            va="center_baseline",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8},
        )


def rectangle(panel: Axes, box: Sequence[float], colour: str, line: Any, width: float) -> None:
    x1, y1, x2, y2 = box
    # Pixel i spans [i, i + 1] in box coordinates, but [i - 0.5, i + 0.5] in the picture's.
    # The dark rim keeps every colour apart from every ground.
    rim = patheffects.withStroke(linewidth=width + 0.8, foreground="black", alpha=0.7)
    panel.add_patch(
        Rectangle(
            (x1 - 0.5, y1 - 0.5),
            x2 - x1,
            y2 - y1,
            fill=False,
            edgecolor=colour,
            linestyle=line,
            linewidth=width,
            path_effects=[rim],
        )
    )


def class_colour(label: int) -> str:
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


def save(figure: Figure, out: str | Path) -> Path:
    """Write the picture whole or not at all; without an ending to its name it is a PNG. Returns the file it is in.

    Raises:
        ValueError: pictures of that ending are not supported.
        UnwritableFileError: the file cannot be written.
    """
    out = Path(out)
    if not out.suffix:
        out = out.with_name(f"{out.name}.png")
    kind = out.suffix[1:].lower()
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(
            f"{out}: pictures that end in .{kind} are not supported; supported: {', '.join(sorted(known))}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        figure.savefig(temporary, format=kind, dpi=130)
    return out
