from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from tardkd import cli
from tardkd.data import Scenes
from tardkd.seeing import curves, plots
from tardkd.seeing.curves import plot_curves, unique_names
from tardkd.seeing.plots import draw_detections, literal


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Every figure saved, for a look inside."""
    saved: list[Figure] = []
    save = plots.save
    for module in (plots, curves):
        monkeypatch.setattr(module, "save", lambda figure, out: (saved.append(figure), save(figure, out)))
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


def panels(figure: Figure) -> dict[str, list]:
    """The lines of every panel by its title."""
    return {axes.get_title(loc="left"): axes.get_lines() for axes in figure.axes}


def test_curves(tmp_path, figures):
    runs = {
        "alone": write_run(tmp_path / "a", distilled=False),
        "taught": write_run(tmp_path / "b", distilled=True, steps=20) / "train.csv",
    }
    plot_curves(runs, tmp_path / "new" / "curves.png")
    assert Image.open(tmp_path / "new" / "curves.png").width > 1000
    drawn = panels(figures[0])
    assert list(drawn) == [
        "average precision, percent",
        "detector loss, all parts",
        "losses of the box head",
        "distillation: features, weighted",
        "regions with an open feature gate, share",
        "regions with an open box gate, share",
        "schedule's weight lambda",
    ]
    precision = drawn["average precision, percent"]
    assert [line.get_xydata().tolist() for line in precision[:2]] == [
        [[1, 10], [2, 20], [3, 30]],
        [[1, 20], [2, 40], [3, 60]],
    ]
    assert [line.get_linestyle() for line in precision] == ["-", "--", "-", "--"]
    loss = drawn["detector loss, all parts"]
    assert [line.get_xdata()[-1] for line in loss] == [3, 3]  # epochs, whatever the steps in one
    assert len(drawn["distillation: features, weighted"]) == 1
    colours = [line.get_color() for line in loss]
    assert colours == [precision[0].get_color(), precision[2].get_color()] == list(curves.COLOURS[:2])
    assert drawn["schedule's weight lambda"][0].get_color() == colours[1]
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["alone (AP 30.0 after epoch 3)", "taught (AP 30.0 after epoch 3)"]


def test_loss_curve_is_the_moving_mean_of_the_sum(tmp_path, figures):
    plot_curves({"a": write_run(tmp_path / "a", distilled=False, epochs=5)}, tmp_path / "curves.svg")
    [line] = panels(figures[0])["detector loss, all parts"]
    values = line.get_ydata()
    assert len(values) == 200 - 6 + 1
    assert values[0] == pytest.approx(sum(2 / step for step in range(1, 7)) / 6)
    assert len(figures[0].axes) == 3  # nothing distilled, so no panels for it


def test_a_run_in_progress(tmp_path, figures):
    """Its last line is still being written, and it has not been evaluated."""
    folder = write_run(tmp_path / "a", distilled=True, epochs=2)
    (folder / "eval.csv").write_text("")
    with open(folder / "train.csv", "a") as file:
        file.write("3,81,0.5,0.")
    plot_curves({"a": folder}, tmp_path / "curves.png")
    [line] = panels(figures[0])["schedule's weight lambda"]
    assert line.get_xdata()[[0, -1]].tolist() == [1 / 40, 2]
    assert figures[0].legends[0].get_texts()[0].get_text() == "a (not evaluated yet)"


def test_in_its_first_epoch_a_run_is_as_far_as_another_says(tmp_path, figures):
    early = write_run(tmp_path / "early", distilled=False, epochs=1, steps=10)
    (early / "eval.csv").unlink()
    plot_curves({"early": early}, tmp_path / "one.png")
    assert figures[0].axes[0].get_xlabel() == "step of the first epoch"
    assert panels(figures[0])["detector loss, all parts"][0].get_xdata()[-1] == 10
    plot_curves({"early": early, "other": write_run(tmp_path / "other", distilled=False)}, tmp_path / "two.png")
    assert figures[1].axes[0].get_xlabel() == "epoch"
    assert panels(figures[1])["detector loss, all parts"][0].get_xdata()[-1] == 10 / 40


def test_names_of_runs_are_unique_and_short():
    assert list(unique_names(["/x/seed0/distilled", "/x/seed1/distilled/", "/x/seed0/baseline"])) == [
        "seed0/distilled",
        "seed1/distilled",
        "baseline",
    ]
    assert list(unique_names(["/a/run", "/b/a/run", "/a/run"])) == ["//a/run", "b/a/run"]


def test_the_plot_command(tmp_path, capsys):
    one, two = write_run(tmp_path / "one", distilled=False), write_run(tmp_path / "two", distilled=True)
    assert cli.main(["plot", str(one), str(two), "--out", str(tmp_path / "curves.svg")]) == 0
    assert f"{tmp_path / 'curves.svg'}: one, two" in capsys.readouterr().out
    picture = (tmp_path / "curves.svg").read_text()
    assert picture.count("<svg") == 1 and "distillation: features" in picture
    for words, message in [
        (
            [str(tmp_path), "--out", "x.png"],
            (f"{tmp_path} is no run's folder: it has no train.csv; there are runs in it: one, two"),
        ),
        ([str(tmp_path / "no"), "--out", "x.png"], "is no run's folder: it has no train.csv\n"),
        ([str(one), "--out", str(tmp_path / "x.doc")], "not supported"),
    ]:
        assert cli.main(["plot", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "rows, message",
    [
        ("epoch,step,loss_box_reg\n", "has no step to plot yet"),
        ("", "has no step to plot yet"),
        ("epoch,step,loss_box_reg\n1,1,a\n", "a row that does not fit its columns"),
        ("epoch,step,loss_box_reg\n1,1\n1,2,3\n", "a row that does not fit its columns"),
    ],
)
def test_logs_that_cannot_be_plotted_are_named(tmp_path, rows, message):
    folder = write_run(tmp_path / "a", distilled=False)
    (folder / "train.csv").write_text(rows)
    with pytest.raises(ValueError, match=f"train.csv .*{message}"):
        plot_curves({"a": folder}, tmp_path / "curves.png")


def test_names_with_signs_of_their_own(tmp_path):
    """Dollars are no formula, and what Unicode takes for the end of a line is none in a table."""
    folder = write_run(tmp_path / "$_$", distilled=False)
    table = (folder / "eval.csv").read_text().splitlines()
    table[0] += ',"AP/odd\u2028name"'
    (folder / "eval.csv").write_text("\n".join([table[0], *(f"{line},1" for line in table[1:])]) + "\n")
    plot_curves({"$_$": folder}, tmp_path / "curves.png")
    image = Scenes(1, 64, 0)[0][0]
    draw_detections(image, {"$_$": boxes([1, 1, 9, 9, 1, 0.9])}, ["$_$"], tmp_path / "one.png")
    assert literal("a $5") == r"a \$5"


def boxes(*rows: list[float], scores: bool = True) -> dict[str, torch.Tensor]:
    """From rows x1, y1, x2, y2, label, score."""
    table = torch.tensor(rows).reshape(-1, 6)
    columns = {"boxes": table[:, :4], "labels": table[:, 4].long()}
    return {**columns, "scores": table[:, 5]} if scores else columns


def test_detections(tmp_path, figures):
    truth = boxes([10, 10, 30, 30, 1, 0], [40, 40, 60, 60, 2, 0], [5, 40, 15, 60, 2, 0], scores=False)
    found = boxes(
        [11, 10, 30, 30, 1, 0.9],  # right
        [10, 11, 30, 30, 1, 0.8],  # the same object again
        [40, 40, 60, 60, 1, 0.7],  # wrong class
        [5, 40, 15, 60, 2, 0.3],
    )  # right, but too unsure to draw
    image = Scenes(1, 64, 0)[0][0]
    draw_detections(
        image, {"ground truth": truth, "student": found}, ["disc", "ball"], tmp_path / "one.png", min_score=0.5
    )
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
    draw_detections(
        images,
        {"a": [boxes(), boxes()], "b": [boxes([1, 1, 9, 9, 3, 0.9]), boxes()]},
        ["x", "y", "z"],
        tmp_path / "two.png",
    )
    assert sum(len(axes.patches) for axes in figures[0].axes) == 1
    with pytest.raises(ValueError, match="column 'a' has 1 entries for 2 images"):
        draw_detections(images, {"a": [boxes()]}, ["x", "y", "z"], tmp_path / "two.png")


@pytest.mark.parametrize("name, written", [("p", "p.png"), ("p.svg", "p.svg"), ("a.b/p", "a.b/p.png")])
def test_plot_names_the_file_that_it_wrote(tmp_path, capsys, name, written):
    folder = write_run(tmp_path / "a", distilled=False)
    assert cli.main(["plot", str(folder), "--out", str(tmp_path / name)]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / written}: a")
    assert (tmp_path / written).stat().st_size > 1000
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "p").exists()


def test_the_detectors_loss_of_other_families_is_the_loss_without_the_terms(tmp_path):
    (tmp_path / "train.csv").write_text("epoch,step,loss,classification,bbox_ctrness,distill_feature\n1,1,7,2,3,2\n")
    steps, _ = curves._read_run(tmp_path)
    assert steps[curves.DETECTOR].tolist() == [5.0]
