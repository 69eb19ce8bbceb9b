from __future__ import annotations

import csv
import shutil

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.ops import box_iou
from train.recipe import MODEL

from tardkd import cli
from tardkd.data import Scenes
from tardkd.data.scenes import write_scenes
from tardkd.distill import Distiller, DistillSettings
from tardkd.seeing import region_plots
from tardkd.seeing.inspect import inspect_run
from tardkd.seeing.region_plots import draw_overview, draw_page
from tardkd.seeing.regions import COLUMNS, LESSONS, TaughtRegions, look_at
from tardkd.train import checkpoint
from tardkd.train.config import ConfigError
from tardkd.train.models import ModelSpec, build_model

CLASSES = ["target", "ball", "board", "parcel", "sign", "star"]


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    saved: list[Figure] = []
    monkeypatch.setattr(region_plots, "save", lambda figure, out: saved.append(figure))
    return saved


def distiller(norm: str = "group", **settings) -> Distiller:
    torch.manual_seed(0)
    student, teacher = (
        build_model(ModelSpec(**{**MODEL, "norm": norm, "width": width}), len(CLASSES)) for width in (0.125, 0.25)
    )
    return Distiller(student, teacher, DistillSettings(**settings))


def scene(size: int = 64) -> tuple[torch.Tensor, dict]:
    image, target = Scenes(1, size, 0)[0]
    return image.float() / 255, target


def crafted(*rows: tuple) -> TaughtRegions:
    """From rows of object, label, gates as letters among fcb, p_T, p_S, IoU_T, IoU_P."""
    things = torch.tensor([[row[0] * 10.0, 0, row[0] * 10 + 9, 9] for row in rows]).reshape(-1, 4)
    gates = torch.tensor([[letter in row[2] for letter in "fcb"] for row in rows], dtype=torch.bool).reshape(-1, 3)
    return TaughtRegions(
        7,
        things + 1,
        torch.tensor([row[1] for row in rows], dtype=torch.int64),
        things,
        gates,
        torch.tensor([row[3:] for row in rows]).reshape(-1, 4),
    )


def test_regions_are_in_image_pixels_and_gates_follow_from_scores():
    image, target = scene(128)  # the models see 64 x 64
    regions = look_at(distiller(), image, target)
    assert len(regions) and (regions.labels > 0).all()
    overlaps = box_iou(regions.objects, target["boxes"])
    assert overlaps.max(1).values.min() > 0.99
    assert torch.equal(target["labels"][overlaps.argmax(1)], regions.labels)
    proposals = box_iou(regions.boxes, regions.objects).diagonal()
    assert torch.allclose(proposals, regions.scores[:, 3], atol=1e-4)
    teacher, student, teacher_iou, other_iou = regions.scores.unbind(1)
    assert torch.equal(regions.gates[:, 1], teacher > student)
    assert torch.equal(regions.gates[:, 2], teacher_iou > other_iou)
    assert torch.equal(regions.gates[:, 0], regions.gates[:, 1:].any(1)) and regions.gates[:, 0].any()


def test_they_are_those_of_a_training_step():
    image, target = scene()
    trained = distiller()
    regions = look_at(trained, image, target, seed=3)
    torch.manual_seed(3)
    trained.train()([image], [target])
    means = torch.stack([trained.stats[f"gate_{name}"] for name in ("feature", "classification", "regression")])
    assert torch.allclose(regions.gates.float().mean(0), means)
    assert trained.stats["foreground"] == len(regions)


def test_looking_leaves_no_trace():
    image, target = scene()
    watched = distiller("batch").train()
    watched.student.backbone.eval()
    before = {name: value.clone() for name, value in watched.student.state_dict().items()}
    modes, random = [module.training for module in watched.modules()], torch.get_rng_state()
    first, second = (look_at(watched, image, target, seed=1) for _ in range(2))
    assert torch.equal(first.boxes, second.boxes) and torch.equal(first.scores, second.scores)
    assert all(torch.equal(value, before[name]) for name, value in watched.student.state_dict().items())
    assert [module.training for module in watched.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_a_term_without_weight_teaches_nothing():
    image, target = scene()
    regions = look_at(distiller(classification=0.0, feature=0.0), image, target)
    assert not regions.gates[:, :2].any()
    assert set(regions.lessons()) <= {"nothing", "box"}


def test_lessons():
    regions = crafted(*((0, 1, gates, 0.5, 0.5, 0.5, 0.5) for gates in ("", "f", "fc", "fb", "cb", "c")))
    assert regions.lessons() == ["nothing", "features alone", "class", "box", "class and box", "class"]


def test_picked_are_the_widest_differences_and_every_object_before_the_second_of_any():
    regions = crafted(
        (0, 1, "", 0.9, 0.1, 0.5, 0.5),
        (0, 1, "", 0.1, 0.8, 0.5, 0.5),
        (0, 1, "", 0.9, 0.3, 0.5, 0.5),
        (1, 2, "", 0.5, 0.5, 0.6, 0.3),
        (2, 2, "", 0.5, 0.5, 0.5, 0.4),
    )

    def picked(count):
        return [regions.scores.tolist().index(scores) for scores in regions.pick(count).scores.tolist()]

    assert picked(3) == [0, 3, 4]
    assert picked(12) == [0, 1, 3, 4]  # no third one of an object
    assert len(crafted().pick(12)) == 0


def test_a_page(figures, tmp_path):
    regions = crafted((0, 1, "fc", 0.9, 0.1, 0.5, 0.5), (1, 2, "", 0.4, 0.5, 0.3, 0.8), (2, 0, "f", 0, 0, 0, 0))
    found = {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    truth = {"boxes": regions.objects[:2], "labels": regions.labels[:2]}
    draw_page(
        torch.zeros(3, 48, 64),
        {"objects": truth, "student": found, "teacher": found},
        regions,
        CLASSES,
        tmp_path / "x.png",
        title="image 7",
        compared="region",
    )
    *columns, picture, table = figures[0].axes
    assert [ax.get_title(loc="left").split(",")[0] for ax in columns] == [
        "objects",
        "student's detections",
        "teacher's detections",
    ]
    assert [len(ax.patches) for ax in columns] == [2, 2, 2]  # one found, one missed
    assert picture.get_title(loc="left") == "what was taught on all 2 foreground regions"
    assert [patch.get_edgecolor()[:3] for patch in picture.patches] == [
        pytest.approx(tuple(int(region_plots.COLOURS[lesson][i : i + 2], 16) / 255 for i in (1, 3, 5)))
        for lesson in ("class", "nothing")
    ]
    texts = {text.get_text(): text.get_weight() for text in table.texts}
    assert (texts["0.10 → 0.90"], texts["0.50 → 0.50"], texts["0.80 → 0.30"]) == ("bold", "normal", "normal")
    assert "All 2 regions: features 1, class 1, box 0" in next(text for text in texts if text.startswith("All"))


def test_an_overview(figures, tmp_path):
    taught = [
        crafted((0, 1, "fc", 0.9, 0.1, 0.5, 0.5), (1, 2, "", 0.4, 0.5, 0.3, 0.8)),
        crafted(),
        crafted((0, 1, "", 0.2, 0.1, 0.5, 0.5), (2, 0, "fcb", 0, 0, 0, 0)),
    ]
    draw_overview(taught, CLASSES, tmp_path / "x.png", compared="student")
    left, middle, right = figures[0].axes
    points = {lesson: cloud.get_offsets().tolist() for lesson, cloud in zip(LESSONS, left.collections)}
    assert points["class"] == [pytest.approx([0.1, 0.9])] and len(points["nothing"]) == 2
    assert middle.get_xlabel() == "student's box"
    assert [bar.get_width() for bar in right.patches] == [0.5, 0.5, 0, 0, 0, 0]  # of class 1, then of class 2
    assert [label.get_text() for label in right.get_yticklabels()] == ["target\nn = 2", "ball\nn = 1"]


def test_the_command(runs, tmp_path, capsys):
    out = tmp_path / "look"
    assert cli.main(["inspect", str(runs / "distilled"), "--out", str(out), "--images", "9"]) == 0
    assert f"{out}: 2 images, " in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"image_1.png", "image_2.png", "overview.png", "regions.csv"}
    assert min(Image.open(path).width for path in out.glob("*.png")) > 1200
    with open(out / "regions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and {row["image_id"] for row in rows} == {"1", "2"}
    assert all(
        (float(row["teacher_score"]) > float(row["student_score"])) == (row["gate_classification"] == "1")
        for row in rows
        if row["teacher_score"] != row["student_score"]
    )
    assert (
        cli.main(
            [
                "inspect",
                str(runs / "distilled" / "best.pt"),
                "--out",
                str(tmp_path / "one"),
                "data.val=3",
                "--ids",
                "3",
                "3",
            ]
        )
        == 0
    )
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"image_3.png", "overview.png", "regions.csv"}


def test_regions_without_a_gate_on_background_and_images_without_objects(runs, tmp_path, monkeypatch):
    settings = ["distill.feature_gate=all", "data.val=1"]
    inspect_run(runs / "distilled" / "last.pt", tmp_path / "all", overrides=settings)
    with open(tmp_path / "all" / "regions.csv", newline="") as file:
        background = [row for row in csv.DictReader(file) if row["class"] == "background"]
    assert background and all(row["object_x1"] == "" and row["gate_feature"] == "1" for row in background)
    monkeypatch.setattr(
        Scenes,
        "_target",
        lambda self, index: {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "image_id": 1},
    )
    summary = inspect_run(runs / "distilled" / "last.pt", tmp_path / "none", overrides=["data.val=1"])
    assert summary == "1 image without a foreground region"
    assert (tmp_path / "none" / "image_1.png").exists()


def test_an_image_that_cannot_be_read_is_left_out(runs, tmp_path):
    """What stands in for it is black, and of another size than its objects."""
    write_scenes(tmp_path, splits={"train": 1, "val": 2}, image_size=64, seed=0)
    split = "{images: images, annotations: annotations/val.json}"
    data = [f"data={{kind: coco, root: {tmp_path}, train: {split}, val: {split}, on_bad_image: skip}}"]
    (tmp_path / "images" / "val_00001.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="cannot read image"):
        summary = inspect_run(runs / "distilled" / "last.pt", tmp_path / "one", overrides=data)
    assert summary.startswith("1 image, ") and not (tmp_path / "one" / "image_1.png").exists()
    with open(tmp_path / "one" / "regions.csv", newline="") as file:
        assert {row["image_id"] for row in csv.DictReader(file)} == {"2"}
    with (
        pytest.warns(UserWarning, match="cannot read image"),
        pytest.raises(ConfigError, match="none of the 1 images of data.val can be read"),
    ):
        inspect_run(runs / "distilled" / "last.pt", tmp_path / "none", ids=[1], overrides=data)


@pytest.mark.parametrize(
    "run, words, message",
    [
        ("baseline", [], "was trained without a teacher"),
        ("distilled", ["--ids", "1", "44"], "data.val has no image 44; its 2 ids go from 1 to 2"),
        ("distilled", ["teacher.weights=gone.pt"], "had the teacher gone.pt, which is not there; teacher.weights=FILE"),
        ("distilled", ["distill={gaussian: 1, feature: 0, classification: 0, regression: 0}"], "no gates to show"),
        ("nothing", [], "there is no checkpoint at"),
    ],
)
def test_mistakes(runs, tmp_path, capsys, run, words, message):
    assert cli.main(["inspect", str(runs / run), "--out", str(tmp_path / "x"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_another_data_set_is_refused(runs, tmp_path, capsys):
    shutil.copytree(runs / "distilled", tmp_path / "run")
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    checkpoint.save(tmp_path / "run" / "last.pt", {**state, "classes": state["classes"][::-1]})
    assert cli.main(["inspect", str(tmp_path / "run"), "--out", str(tmp_path / "x")]) == 2
    assert "data.val has" in capsys.readouterr().err
