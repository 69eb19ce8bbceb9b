"""Whether the teacher fits, and whether it knows anything."""

from __future__ import annotations

from statistics import fmean

import torch
from train.recipe import recipe, teacher_file

from tardkd.data.scenes import CLASSES
from tardkd.distill.classes import match_classes
from tardkd.doctor import teacher
from tardkd.train.batches import build_batches
from tardkd.train.build import build_dataset
from tardkd.train.evaluate import evaluate

from .reports import doctor, found, numbers


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
