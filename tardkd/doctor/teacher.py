"""Checks of the two models: do the teacher's weights fit, can the two be paired, does the teacher know anything."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from tardkd.detectors import find, for_model
from tardkd.distill import Distiller
from tardkd.distill.classes import ClassMap
from tardkd.distill.findings import Finding, first, ok, problem, warning
from tardkd.distill.teachers import FrozenTeacher
from tardkd.train.batches import build_batches
from tardkd.train.build import TeacherFile, build_distiller, place, read_teacher
from tardkd.train.config import Config, ConfigError, Teacher
from tardkd.train.evaluate import evaluate
from tardkd.train.models import build_model
from tardkd.weights import Fit, compare

from .report import describe_error
from .subject import Subject

LEAST_AP = 5.0  # percent; a teacher below it is untrained, or of other data


def check_models(subject: Subject) -> Iterator[Finding]:
    """Build them, without the teacher where it cannot be had, so that the student can still be looked at."""
    config, class_names = subject.config, _class_names(subject)
    files: dict[str, TeacherFile] = {}  # each is read once, to be compared and to be loaded
    if config.distill.enabled:
        fits = [_fit(key, section, class_names, files) for key, section in config.teachers.items()]
        yield from fits
        if any(finding.level == "problem" for finding in fits):
            config = _alone(config)
    try:
        distiller = build_distiller(config, class_names, files)
    except Exception as error:
        if not config.distill.enabled:
            raise
        yield problem(f"teacher and student cannot be paired: {describe_error(error)}")
        config = _alone(config)
        distiller = build_distiller(config, class_names)
    subject.distiller = distiller
    place(config, distiller, subject.device, compiled=False)
    sizes = [f"the student has {_millions(distiller.student)} parameters"]
    sizes += [f"{name} {_millions(teacher)}" for name, teacher in _named(distiller)]
    if subject.config.distill.enabled and not distiller.teachers:
        sizes.append("which is looked at alone from here on")
    yield ok("; ".join([", ".join(sizes), *distiller.describe()]))


def _named(distiller: Distiller) -> list[tuple[str, nn.Module]]:
    return [(paired.name, paired.model) for paired in distiller.frozen_teachers]


def _class_names(subject: Subject) -> list[str]:
    dataset = subject.train_set if subject.train_set is not None else subject.val_set
    if dataset is None:
        raise ConfigError("the number of classes is unknown without data")
    return dataset.class_names


def _alone(config: Config) -> Config:
    return config.model_copy(update={"distill": replace(config.distill, enabled=False), "teacher": None})


def _fit(key: str, teacher: Teacher, class_names: list[str], files: dict[str, TeacherFile]) -> Finding:
    """How much of the teacher of the section `key` its file fills; the file is added to `files`."""
    try:
        file = read_teacher(teacher, class_names, key)
        if file is None:
            return ok(
                f"{key}.weights DEFAULT: torchvision's own, whole but for the head, of which the outputs of your "
                f"{len(class_names)} classes are taken"
            )
        files[key] = file
        with torch.device("meta"):  # names and shapes are all that is compared
            model = build_model(file.spec.model_copy(update={"weights": None}), len(file.classes))
        return _describe_fit(compare(model, file.weights), for_model(model).class_tensors)
    except Exception as error:
        return problem(describe_error(error), f"train the teacher first (--role teacher), or mend {key}.weights")


def _describe_fit(fit: Fit, class_tensors: tuple[str, ...]) -> Finding:
    share = fit.matched / fit.total
    text = (
        f"{fit.source} fills {fit.matched} of the teacher's {fit.total} tensors ({share:.0%}), "
        f"{fit.parameters:.1%} of its parameters"
    )
    numbers = {
        "tensors": share,
        "parameters": fit.parameters,
        "missing": fit.missing,
        "unexpected": fit.unexpected,
        "of_another_shape": [f"{name} {shapes}" for name, shapes in fit.of_another_shape.items()],
    }
    if fit.is_complete:
        return ok(text, **numbers)
    names = {*fit.missing, *fit.unexpected, *fit.of_another_shape}
    has_other_classes = all(name.startswith(class_tensors) for name in names)
    advice = "the file has other classes" if has_other_classes else "is teacher.model the model that this file is of?"
    return problem(f"{text}; {fit.describe()}", advice, **numbers)


def _millions(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M"


def check_precision(subject: Subject) -> Iterator[Finding]:
    """AP on some validation images of the student as it starts, and of the teacher."""
    config, dataset, distiller = subject.config, subject.val_set, subject.distiller
    chosen = subject.sample(dataset)
    batches = build_batches(config, Subset(dataset, chosen))
    began = time.perf_counter()
    student = evaluate(distiller.student, batches, dataset)
    subject.evaluation = (time.perf_counter() - began) / len(chosen)
    if student["AP"] is None:
        yield problem(
            f"the {len(chosen)} validation images that were looked at hold no object",
            "raise --images, or see data.val: nothing can be evaluated without objects",
        )
        return
    yield ok(f"the student starts at AP {student['AP']:.1f} on {len(chosen)} validation images", AP=student["AP"])
    for paired in distiller.frozen_teachers:
        yield from _teacher_precision(paired, student["per_class"], batches, dataset)


class InTheStudentsLabels(nn.Module):
    """A teacher of other classes as a detector of the student's: it finds those that it teaches."""

    def __init__(self, teacher: nn.Module, classes: ClassMap) -> None:
        super().__init__()
        detector = find(teacher)
        self.teacher, self.classes = teacher, classes
        self.detect = teacher if detector is None else detector.detect

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self.classes.detections(detections) for detections in self.detect(images)]


def _teacher_precision(
    paired: FrozenTeacher, student: dict[str, float | None], batches: Any, dataset: Any
) -> Iterator[Finding]:
    """`student`: its AP by class, None where there is no object of the class."""
    name, model, classes = paired.name, paired.model, paired.classes
    metrics = evaluate(InTheStudentsLabels(model, classes), batches, dataset)
    taught = classes.taught
    partial = len(taught) < len(dataset.class_names)
    per_class = {label: metrics["per_class"][label] for label in taught}
    scores = {label: score for label, score in per_class.items() if score is not None}
    if not scores:
        yield warning(
            f"these images hold no object of what {name} teaches: {first(taught)}",
            "raise --images: it could not be looked at",
        )
        return
    ours, theirs = fmean(student[label] for label in scores), fmean(scores.values())
    of_these = f" over the {len(taught)} classes that it teaches" if partial else ""
    text = f"{name} has AP {theirs:.1f} on the same{of_these}"
    numbers = {"AP": theirs, "per_class": scores}
    zeros = [label for label, score in scores.items() if score == 0]
    if theirs < LEAST_AP:
        yield problem(
            text,
            "a teacher that knows nothing opens few gates, and those by chance: train it first "
            "(--role teacher); do its weights, classes and input size belong together?",
            **numbers,
        )
    elif theirs < ours:
        yield problem(
            f"{text}, less than the student" + (f"'s {ours:.1f}" if partial else ""),
            "the student has nothing to learn from it: take a better teacher",
            **numbers,
        )
    else:
        yield ok(text, **numbers)
        if zeros:
            yield warning(
                f"{name} finds no object of {first(zeros)}",
                "it will not help with these; raise --images to be sure",
                classes=zeros,
            )
