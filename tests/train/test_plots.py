from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from tardkd.data import Scenes
from tardkd.train import plots
from tardkd.train.plots import draw_detections, plot_curves


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Every figure saved, for a look inside."""
    saved: list[Figure] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, out: (saved.append(figure), save(figure, out)))
    return saved


def write_run(folder: Path, *, distilled: bool, epochs: int = 3, steps: int = 40) -> Path:
    folder.mkdir()
    columns = ["loss_classifier", "loss_box_reg"]
    columns += ["distill_feature", "gate_feature", "gate_regression", "lambda"] if distilled else []
    with open(folder / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", *columns])
        for step in range(1, epochs * steps + 1):
            writer.writerow([(step - 1) // steps + 1, step, *[1 / step] * len(columns)])
    with open(folder / "eval.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", "AP", "AP50", "APl"])
        writer.writerows([epoch, epoch * steps, 10 * epoch, 20 * epoch, ""] for epoch in range(1, epochs + 1))
    return folder


def test_curves(tmp_path, figures):
    runs = {"alone": write_run(tmp_path / "a", distilled=False),
            "taught": write_run(tmp_path / "b", distilled=True, steps=20) / "train.csv"}
    plot_curves(runs, tmp_path / "new" / "curves.png")
    assert Image.open(tmp_path / "new" / "curves.png").width > 1000
    loss, ap, terms, gates = figures[0].axes
    assert [line.get_label() for line in ap.get_lines()] == ["alone AP", "alone AP50", "taught AP", "taught AP50"]
    assert ap.get_lines()[0].get_xydata().tolist() == [[1, 10], [2, 20], [3, 30]]
    assert [line.get_label() for line in loss.get_lines()] == ["alone", "taught"]
    assert [line.get_xdata()[-1] for line in loss.get_lines()] == [3, 3]  # epochs, whatever the steps in one
    assert [line.get_label() for line in terms.get_lines()] == ["feature"]
    assert [line.get_label() for line in gates.get_lines()] == ["feature gate", "regression gate", "schedule weight"]


def test_loss_curve_is_the_moving_mean_of_the_sum(tmp_path, figures):
    plot_curves({"a": write_run(tmp_path / "a", distilled=False, epochs=5)}, tmp_path / "curves.png")
    values = figures[0].axes[0].get_lines()[0].get_ydata()
    assert len(values) == 200 - 6 + 1
    assert values[0] == pytest.approx(sum(2 / step for step in range(1, 7)) / 6)
    assert len(figures[0].axes) == 2  # nothing distilled, so no panels for it


def test_runs_without_rows_are_named(tmp_path):
    folder = write_run(tmp_path / "a", distilled=False)
    (folder / "eval.csv").write_text("epoch,step,AP\n")
    with pytest.raises(ValueError, match="eval.csv has no rows"):
        plot_curves({"a": folder}, tmp_path / "curves.png")


def boxes(*rows: list[float], scores: bool = True) -> dict[str, torch.Tensor]:
    """From rows x1, y1, x2, y2, label, score."""
    table = torch.tensor(rows).reshape(-1, 6)
    columns = {"boxes": table[:, :4], "labels": table[:, 4].long()}
    return {**columns, "scores": table[:, 5]} if scores else columns


def test_detections(tmp_path, figures):
    truth = boxes([10, 10, 30, 30, 1, 0], [40, 40, 60, 60, 2, 0], [5, 40, 15, 60, 2, 0], scores=False)
    found = boxes([11, 10, 30, 30, 1, 0.9],  # right
                  [10, 11, 30, 30, 1, 0.8],  # the same object again
                  [40, 40, 60, 60, 1, 0.7],  # wrong class
                  [5, 40, 15, 60, 2, 0.3])  # right, but too unsure to draw
    image = Scenes(1, 64, 0)[0][0]
    draw_detections(image, {"ground truth": truth, "student": found}, ["disc", "ball"], tmp_path / "one.png",
                    min_score=0.5)
    assert Image.open(tmp_path / "one.png").width > 500
    left, right = figures[0].axes
    assert [axes.get_title() for axes in (left, right)] == ["ground truth", "student"]
    assert len(left.patches) == 3 and all(patch.get_linestyle() in ("-", "solid") for patch in left.patches)
    missed, drawn = right.patches[:2], right.patches[2:]
    assert {patch.get_xy() for patch in missed} == {(39.5, 39.5), (4.5, 39.5)}
    assert [patch.get_linestyle() in ("-", "solid") for patch in drawn] == [True, False, False]
    assert [text.get_text() for text in right.texts] == ["90", "80", "70"]


def test_several_images_without_truth_or_detections(tmp_path, figures):
    scenes = Scenes(2, 64, 0)
    images = [scenes[i][0] for i in range(2)]
    draw_detections(images, {"a": [boxes(), boxes()], "b": [boxes([1, 1, 9, 9, 3, 0.9]), boxes()]},
                    ["x", "y", "z"], tmp_path / "two.png")
    assert sum(len(axes.patches) for axes in figures[0].axes) == 1
    with pytest.raises(ValueError, match="column 'a' has 1 entries for 2 images"):
        draw_detections(images, {"a": [boxes()]}, ["x", "y", "z"], tmp_path / "two.png")
