"""What the doctor says of a sound recipe, and of recipes that are broken in one way each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean

import pytest
import torch
import yaml
from rich.console import Console
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_convert, box_iou
from train.recipe import MODEL, recipe, teacher_file, tree

from tardkd.cli import main
from tardkd.data.scenes import CLASSES, write_scenes
from tardkd.detectors.anchors import Anchors
from tardkd.distill.classes import match_classes
from tardkd.doctor import anchors, examine, gradients, speed, teacher
from tardkd.train.batches import build_batches
from tardkd.train.build import build_dataset
from tardkd.train.evaluate import evaluate
from tardkd.train.models import ModelSpec, build_model


def doctor(folder: Path, *overrides: str, role: str = "distilled", changes: dict | None = None):
    """The report on the tiny recipe, written to a file of `folder`."""
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump({**tree(folder / "out"), **(changes or {})}))
    return examine(str(config), ["train.threads=1", *overrides], role=role, console=Console(quiet=True), images=4)


def found(report, level: str, check: str = "") -> list[str]:
    """Text and advice of the findings of that level."""
    return [
        f"{finding.text} -> {finding.advice}"
        for name, finding in report.findings
        if finding.level == level and check in name
    ]


def numbers(report, check: str, key: str):
    return next(finding.numbers[key] for name, finding in report.findings if name == check and key in finding.numbers)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A teacher of the tiny recipe that has learned nothing."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.manual_seed(0)
    torch.save(build_model(ModelSpec(**tree(path)["teacher"]["model"]), 6).state_dict(), path)
    return f"teacher.weights={path}"


@pytest.fixture
def no_standards(monkeypatch):
    """Lets the untrained teacher pass: the tests have no time to train one."""
    monkeypatch.setattr(teacher, "LEAST_AP", 0.0)


@pytest.fixture(scope="module")
def sound(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "LEAST_AP", 0.0)
        report = doctor(folder, weights)
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]  # nothing is left behind
    return report


@pytest.fixture
def coco(tmp_path) -> dict:
    """The scenes as files, to be broken; and the data section of a recipe for them."""
    write_scenes(tmp_path / "data", splits={"train": 4, "val": 2}, image_size=64, seed=0)
    return {
        "data": {
            "kind": "coco",
            "root": str(tmp_path / "data"),
            **{split: {"images": "images", "annotations": f"annotations/{split}.json"} for split in ("train", "val")},
        }
    }


def edit(folder: Path, split: str, change) -> None:
    path = folder / "data" / "annotations" / f"{split}.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_sound_recipe_has_no_problem_and_every_check_says_something(sound):
    assert found(sound, "problem") == [] and found(sound, "skipped") == [] and sound.status == 0
    assert list(dict.fromkeys(name for name, _ in sound.findings)) == [
        "configuration",
        "output",
        "device",
        "training data",
        "validation",
        "classes",
        "overlap",
        "optimizer",
        "models",
        "anchors",
        "precision",
        "gradients",
        "speed",
    ]
    texts = " ".join(finding.text for _, finding in sound.findings)
    for part in (
        "7 images, all there; 4 opened",
        "6 classes, the same in both",
        "(100%), 100.0% of its parameters",
        "3 training steps, all terms finite",
        "gradients reach all",
        "the teacher gets none",
        "foreground regions a step",
        "3 steps an epoch, ",
    ):
        assert part in texts, part


def test_the_command_prints_writes_json_and_returns_the_status(tmp_path, capsys):
    config, out = tmp_path / "recipe.yaml", tmp_path / "report.json"
    config.write_text(yaml.safe_dump(tree(tmp_path / "out")))
    command = ["doctor", "--config", str(config), "--role", "baseline", "--json", str(out), "--images", "2"]
    assert main([*command, "optimizer.lr=0.001"]) == 0
    printed = capsys.readouterr().out
    assert "the run can start" in printed and "Traceback" not in printed
    report = json.loads(out.read_text())
    assert report["problems"] == 0 and {finding["check"] for finding in report["findings"]} >= {"models", "speed"}
    assert not any("teacher" in finding["text"] for finding in report["findings"])
    assert main([*command, "optimizer.rate=1"]) == 1
    report = json.loads(out.read_text())
    assert "unknown key" in report["findings"][0]["text"]
    assert {finding["level"] for finding in report["findings"][1:]} == {"skipped"}


def test_a_missing_image(tmp_path, coco):
    (tmp_path / "data" / "images" / "train_00002.png").unlink()
    report = doctor(tmp_path, role="baseline", changes=coco)
    (text,) = found(report, "problem")
    assert "1 of 4 images" in text and "train_00002.png" in text and report.status == 1
    assert found(report, "ok", "validation") and found(report, "ok", "precision")  # what can go on goes on
    assert found(report, "skipped", "gradients") == ["needs training data -> "]


def test_an_image_that_cannot_be_read_or_has_another_size(tmp_path, coco):
    (tmp_path / "data" / "images" / "train_00001.png").write_bytes(b"no image")
    edit(tmp_path, "val", lambda data: data["images"][1].update(width=65))
    report = doctor(tmp_path, role="baseline", changes=coco)
    (text,) = found(report, "problem", "training data")
    assert "1 of the 4 images opened cannot be used: image id 1: cannot read image" in text
    assert "is 64x64, its annotation says 65x64" in found(report, "problem", "validation")[0]


def test_images_that_the_training_would_do_without(tmp_path, coco):
    """Where it is told to, and says nothing, the doctor says how many."""
    coco["data"]["on_bad_image"] = "skip"
    (tmp_path / "data" / "images" / "train_00001.png").write_bytes(b"no image")
    (tmp_path / "data" / "images" / "train_00003.png").unlink()
    (tmp_path / "data" / "images" / "val_00002.png").unlink()
    report = doctor(tmp_path, role="baseline", changes=coco)
    train, val = found(report, "warning", "training data")[0], found(report, "warning", "validation")[0]
    assert "1 of the 4 images are missing, 2 of the 4 opened cannot be used: image id 1: cannot read" in train
    assert "1 of the 2 images are missing, 1 of the 2 opened cannot be used" in val and "on_bad_image=skip" in val
    assert not found(report, "problem")


def test_a_missing_image_is_in_no_two_splits(tmp_path, coco):
    coco["data"].update(on_bad_image="skip", val={**coco["data"]["val"], "images": "other"})
    shutil.copytree(tmp_path / "data" / "images", tmp_path / "data" / "other")
    edit(tmp_path, "val", lambda data: data["images"][0].update(file_name="train_00001.png"))
    report = doctor(tmp_path, role="baseline", changes=coco)
    assert "1 of 2 validation images are also trained on: train_00001.png" in found(report, "warning", "overlap")[0]
    (tmp_path / "data" / "other" / "train_00001.png").unlink()
    report = doctor(tmp_path, role="baseline", changes=coco)
    assert "no image is in both" in found(report, "ok", "overlap")[0]


def test_weights_of_another_model(tmp_path, weights):
    report = doctor(tmp_path, weights, "teacher.model.fpn_channels=8", "teacher.model.blocks=[1,2]")
    (text,) = found(report, "problem", "models")
    assert "missing: backbone.body.layer2.1" in text and "of another shape: backbone.fpn" in text
    assert "is teacher.model the model that this file is of?" in text
    assert 0.2 < numbers(report, "models", "tensors") < 0.9 and report.status == 1
    assert found(report, "ok", "gradients")  # of the student alone


def test_weights_that_are_not_there(tmp_path):
    report = doctor(tmp_path)
    assert "there is no checkpoint at" in found(report, "problem", "models")[0]
    assert found(report, "ok", "gradients")


def test_a_teacher_that_knows_nothing(tmp_path, weights):
    report = doctor(tmp_path, weights)
    (text,) = found(report, "problem")
    assert "the teacher has AP 0.0" in text and "opens few gates" in text and report.status == 1


def scores(monkeypatch, *evaluations: dict[str, float | None]) -> list[torch.nn.Module]:
    """Makes these the results, in turn: AP of "ball" and "star", 20 of every other class; returns the models."""
    results, models = iter(evaluations), []

    def evaluate(model, *_):
        models.append(model)
        per_class = {**dict.fromkeys(CLASSES, 20.0), **next(results)}
        return {"AP": fmean(ap for ap in per_class.values() if ap is not None), "per_class": per_class}

    monkeypatch.setattr(teacher, "evaluate", evaluate)
    return models


def test_a_teacher_worse_than_the_student_and_one_that_misses_a_class(tmp_path, weights, monkeypatch):
    scores(monkeypatch, {"ball": 30.0}, {}, {"ball": 0.0, "star": 0.0}, {"ball": 0.0, "star": 50.0})
    (text,) = found(doctor(tmp_path, weights), "problem")
    assert "the teacher has AP 20.0 on the same, less than the student" in text
    report = doctor(tmp_path, weights)
    assert not report.status and "the teacher finds no object of ball" in found(report, "warning", "precision")[0]


def test_teachers_of_other_classes_are_tried_on_those_that_they_teach(tmp_path, monkeypatch, no_standards):
    others = [name for name in CLASSES if name not in ("ball", "star")]
    first = teacher_file(tmp_path / "first.pt", ["star", "else", "ball"])
    second = teacher_file(tmp_path / "second.pt", others)
    changes = {"teacher": [{"weights": first}, {"weights": second}]}
    report = doctor(tmp_path, changes=changes)
    _ours, one, other = found(report, "ok", "precision")
    assert "teacher 0 has AP 0.0 on the same over the 2 classes that it teaches" in one
    assert f"teacher 1 has AP 0.0 on the same over the {len(others)} classes that it teaches" in other
    assert not found(report, "skipped")

    first_teacher = {"ball": 50.0, "star": 10.0, others[0]: 0.0}
    models = scores(monkeypatch, {"ball": 40.0, "star": 30.0}, first_teacher, {"star": 0.0})
    report = doctor(tmp_path, changes=changes)
    (text,) = found(report, "problem")
    assert "teacher 0 has AP 30.0 on the same over the 2 classes that it teaches, less than the student's 35.0" in text
    assert "teacher 1 has AP 20.0" in found(report, "ok", "precision")[1]
    assert not found(report, "warning", "precision")  # classes that it does not teach are not missed
    labels = models[1]([torch.rand(3, 64, 64)])[0]["labels"].tolist()
    assert labels and set(labels) <= {list(CLASSES).index(name) + 1 for name in ("ball", "star")}

    scores(monkeypatch, {}, {"ball": None, "star": None}, {})
    text = found(doctor(tmp_path, changes=changes), "warning", "precision")[0]
    assert "these images hold no object of what teacher 0 teaches: ball, star" in text


def test_a_teachers_detections_count_under_the_students_labels(tmp_path):
    """A teacher with the classes in another order, that finds every object: perfect through its map alone."""
    config = recipe(tmp_path)
    dataset = build_dataset(config, "val")
    names = list(CLASSES)
    order = names[3:] + names[:3]

    class Knowing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.seen = 0

        def forward(self, images):
            first, self.seen = self.seen, self.seen + len(images)
            return [
                {
                    "boxes": target["boxes"],
                    "scores": torch.ones(len(target["labels"])),
                    "labels": torch.tensor([order.index(names[one - 1]) + 1 for one in target["labels"].tolist()]),
                }
                for _, target in (dataset[i] for i in range(first, first + len(images)))
            ]

    batches = build_batches(config, dataset)
    assert evaluate(Knowing(), batches, dataset)["AP"] < 50
    mapped = teacher.InTheStudentsLabels(Knowing(), match_classes(names, order))
    assert evaluate(mapped, batches, dataset)["AP"] > 99.9


def test_boxes_outside_and_without_extent(tmp_path, coco):
    def break_some(data):
        data["annotations"][0]["bbox"] = [100, 10, 20, 20]
        data["annotations"][1]["bbox"] = [10, 10, 0, 20]
        for annotation in data["annotations"][2:5]:
            annotation["bbox"] = [40, 40, 50, 20]

    edit(tmp_path, "train", break_some)
    report = doctor(tmp_path, role="baseline", changes=coco)
    lost, outside = found(report, "problem")
    assert "2 of" in lost and "[100.0, 10.0, 20.0, 20.0] in train_00001.png" in lost
    assert "[x, y, width, height]" in lost
    assert "3 of" in outside and "stand over their image's border" in outside and report.status == 1
    assert "all boxes lie within" in found(report, "ok", "validation")[2]


def test_one_bad_box_among_many_is_a_warning(tmp_path, coco):
    def break_one(data):
        data["annotations"] = data["annotations"] * 10
        data["annotations"][0] = {**data["annotations"][0], "bbox": [10, 10, 20, 0]}

    edit(tmp_path, "train", break_one)
    report = doctor(tmp_path, role="baseline", changes=coco)
    assert not report.status and "1 of" in found(report, "warning", "training data")[0]


def test_other_classes_in_validation(tmp_path, coco):
    edit(tmp_path, "val", lambda data: data["categories"][0].update(name="bull's eye"))
    report = doctor(tmp_path, role="baseline", changes=coco)
    (text,) = found(report, "problem")
    assert "only training has target; only validation has bull's eye" in text and report.status == 1


def test_classes_without_an_object_crowds_empty_images_and_gaps(tmp_path, coco):
    def change(data):
        data["categories"].append({"id": 90, "name": "unicorn"})
        data["annotations"][0]["iscrowd"] = 1

    edit(tmp_path, "train", change)
    edit(tmp_path, "val", change)
    edit(tmp_path, "train", lambda data: data["images"].extend({**data["images"][0], "id": i} for i in range(90, 95)))
    report = doctor(tmp_path, role="baseline", changes=coco)
    assert "no training object of" in found(report, "warning", "classes")[0]
    assert "unicorn" in found(report, "warning", "classes")[0]
    assert "do not count from 1 without gaps, which is fine" in found(report, "ok", "classes")[0]
    assert "1 crowds" in found(report, "warning", "training data")[0]
    assert "5 images (56%) without an object" in found(report, "warning", "training data")[0]


def test_images_in_both_splits(tmp_path, coco, sound):
    coco["data"]["val"] = coco["data"]["train"]
    report = doctor(tmp_path, role="baseline", changes=coco)
    assert "4 of 4 validation images are also trained on: train_00001.png" in found(report, "warning", "overlap")[0]
    assert not found(sound, "warning", "overlap")


def test_the_output_folder(tmp_path, runs):
    changes = {"output": str(runs)}
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump({**tree(tmp_path), **changes}))

    def look(*overrides):
        return examine(str(config), overrides, role="baseline", images=2, console=Console(quiet=True))

    assert "2 of 2 epochs done -> train with --resume" in found(look(), "warning", "output")[0]
    (text,) = found(look("optimizer.lr=0.5"), "problem")
    assert "cannot be resumed" in text and "optimizer.lr (0.01 -> 0.5)" in text
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before
    assert "is free" in found(look(f"output={tmp_path}/new/deep"), "ok", "output")[0]
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "baseline").touch()
    assert "is a file, not a folder" in found(look(f"output={tmp_path}/file"), "problem")[0]


def test_optimizer_hints(tmp_path):
    report = doctor(
        tmp_path,
        "optimizer.lr=0.1",
        "optimizer.warmup=5",
        "optimizer.schedule=multistep",
        "optimizer.milestones=[1,8]",
        role="baseline",
    )
    rate, milestones, warmup = found(report, "warning", "optimizer")
    assert "40.0 times" in rate and "optimizer.lr=0.0025" in rate
    assert "milestones 8 are not reached in 2 epochs" in milestones
    assert "5 steps of warm-up in a run of 6" in warmup and not report.status


def test_the_suggested_weights_bring_every_term_to_the_stated_share(tmp_path, weights, no_standards, monkeypatch):
    monkeypatch.setattr(gradients, "STEPS", 1)
    open_gate = "distill.regression_gate=foreground"  # such a teacher's boxes would not open it
    suggested = numbers(doctor(tmp_path, weights, open_gate), "gradients", "suggested")
    assert suggested.keys() == {"feature", "classification", "regression"}
    after = doctor(tmp_path, weights, open_gate, *(f"distill.{name}={value}" for name, value in suggested.items()))
    shares = numbers(after, "gradients", "shares")
    assert all(share == pytest.approx(gradients.SHARE, rel=0.05) for share in shares.values())
    assert not found(after, "warning", "gradients")


def test_terms_that_are_too_strong_or_too_weak_are_named(tmp_path, weights, no_standards):
    report = doctor(tmp_path, weights, "distill.feature=1000", "distill.regression=1e-6")
    text = next(text for text in found(report, "warning", "gradients") if "gradient norm" in text)
    assert "feature" in text.split(";")[-1] and "regression" in text.split(";")[-1]


def test_a_parameter_that_no_loss_uses_is_named(tmp_path, monkeypatch):
    original = teacher.build_distiller

    def with_spare(*args):
        distiller = original(*args)
        distiller.student.spare = torch.nn.Parameter(torch.zeros(3))
        return distiller

    monkeypatch.setattr(teacher, "build_distiller", with_spare)
    (text,) = found(doctor(tmp_path, role="baseline"), "problem")
    assert "no gradient reaches 1 of" in text and "student.spare" in text


def test_a_term_that_is_not_finite_is_named_with_its_images(tmp_path, monkeypatch):
    original = teacher.build_distiller

    def with_nan(*args):
        distiller = original(*args)
        with torch.no_grad():
            distiller.student.rpn.head.cls_logits.bias.fill_(torch.nan)
        return distiller

    monkeypatch.setattr(teacher, "build_distiller", with_nan)
    report = doctor(tmp_path, role="baseline")
    assert "loss_objectness is nan" in found(report, "problem", "gradients")[0]
    assert "images" in found(report, "problem", "gradients")[0]


def test_slow_loading_asks_for_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "_load", lambda subject, load=speed._load: (load(subject)[0], 30.0))
    report = doctor(tmp_path, "train.epochs=4", "train.eval_every=3", role="baseline")
    assert "raise train.workers" in found(report, "warning", "speed")[0]
    assert numbers(report, "speed", "seconds") == pytest.approx(4 * 3 * 30, rel=0.5)
    assert "4 epochs" in found(report, "ok", "speed")[1] and "2 evaluations" in found(report, "ok", "speed")[1]


def test_the_speed_parts_add_up(sound):
    step = numbers(sound, "speed", "step")
    parts = [numbers(sound, "speed", key) for key in ("student", "teacher", "rest")]
    assert all(part > 0 for part in parts[:2]) and sum(parts) >= step * 0.99


def test_anchors_against_a_comparison_with_every_anchor():
    torch.manual_seed(0)
    generator = AnchorGenerator(((12,), (24,), (48,)), ((0.5, 1.0, 2.0),) * 3)
    corners = torch.rand(300, 2) * 80
    sides = torch.rand(300, 2) ** 2 * 70 + 4
    boxes = torch.cat([corners, corners + sides], dim=1).clamp(max=96)
    maps = [torch.zeros(1, 1, 96 // stride, 96 // stride) for stride in (4, 8, 16)]
    (every,) = generator(ImageList(torch.zeros(1, 3, 96, 96), [(96, 96)]), maps)
    expected = (box_iou(boxes, every).amax(dim=1) < 0.5).float().mean()
    assert 0.1 < expected < 0.9
    centred, limits = box_convert(boxes, "xyxy", "cxcywh"), torch.full((300, 2), 96.0)
    ours = Anchors(generator.sizes, generator.aspect_ratios, (4, 8, 16))
    assert anchors._unmatched(centred, limits, ours) == pytest.approx(float(expected), abs=1e-6)


def test_anchors_that_fit_nothing_come_with_better_ones(tmp_path):
    report = doctor(tmp_path, "student.anchor_sizes=[100,200,400]", role="baseline")
    (text,) = found(report, "warning", "anchors")
    assert "student.anchor_sizes=[" in text
    better = text.split("student.anchor_sizes=")[1].split("]")[0] + "]"
    again = doctor(tmp_path, f"student.anchor_sizes={better}", role="baseline")
    assert numbers(again, "anchors", "unmatched") < numbers(report, "anchors", "unmatched")


def test_boxes_are_measured_in_the_students_pixels(tmp_path):
    config = recipe(tmp_path)
    dataset = build_dataset(config, "train")
    sides = []
    for size in (64, 128):
        model = build_model(ModelSpec(**{**MODEL, "min_size": size, "max_size": size}), 6)
        boxes, limits = anchors._boxes(dataset, model)
        _images, targets = model.transform([dataset[0][0].float() / 255], [dict(dataset[0][1])])
        expected = box_convert(targets[0]["boxes"], "xyxy", "cxcywh")
        torch.testing.assert_close(boxes[: len(expected)], expected)
        assert limits[0].tolist() == [size, size]
        sides.append(boxes[:, 2:].mean())
    assert sides[1] == pytest.approx(2 * float(sides[0]))


def test_voc_folders_and_a_teachers_own_training(tmp_path, coco):
    root = tmp_path / "voc"
    for part in ("Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    (tmp_path / "data" / "images").rename(root / "JPEGImages")
    for split in ("train", "val"):
        names = sorted(path.stem for path in (root / "JPEGImages").glob(f"{split}_*"))
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            (root / "Annotations" / f"{name}.xml").write_text(
                f"<annotation><filename>{name}.png</filename><size><width>64</width><height>64</height></size>"
                "<object><name>cat</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>40</xmax><ymax>40</ymax></bndbox>"
                "</object></annotation>"
            )
    report = doctor(tmp_path, role="teacher", changes={"data": {"kind": "voc", "root": str(root)}})
    assert found(report, "problem") == [] and found(report, "skipped") == []
    assert "1 classes, the same in both: cat" in found(report, "ok", "classes")[0]
