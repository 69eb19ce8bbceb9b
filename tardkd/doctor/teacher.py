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

from tardkd.distill import Distiller
from tardkd.distill.classes import ClassMap
from tardkd.distill.teachers import FrozenTeacher
from tardkd.train import checkpoint
from tardkd.train.build import build_distiller, stored_config
from tardkd.train.config import Config, ConfigError, Teacher
from tardkd.train.evaluate import evaluate
from tardkd.train.loop import build_batches
from tardkd.train.models import build_model

from .report import Finding, describe_error, first, ok, problem, warning
from .subject import Subject

LEAST_AP = 5.0  # percent; a teacher below it is untrained, or of other data


def check_models(subject: Subject) -> Iterator[Finding]:
    """Builds them, without the teacher where it cannot be had, so that the student can still be looked at."""
    config = subject.config
    if config.distill.enabled:
        fits = [_fit(key, section, _class_names(subject)) for key, section in config.teachers.items()]
        yield from fits
        if any(finding.level == "problem" for finding in fits):
            config = _alone(config)
    try:
        distiller = build_distiller(config, _class_names(subject))
    except Exception as error:
        if not config.distill.enabled:
            raise
        yield problem(f"teacher and student cannot be paired: {describe_error(error)}")
        config = _alone(config)
        distiller = build_distiller(config, _class_names(subject))
    subject.distiller = distiller.to(subject.device)
    for teacher in distiller.teachers:
        teacher.to(subject.device)
    if config.train.channels_last:
        for model in (distiller, *distiller.teachers):
            model.to(memory_format=torch.channels_last)
    sizes = [f"the student has {_millions(distiller.student)} parameters"]
    sizes += [f"{name} {_millions(teacher)}" for name, teacher in _named(distiller)]
    if subject.config.distill.enabled and not distiller.teachers:
        sizes.append("which is looked at alone from here on")
    yield ok("; ".join([", ".join(sizes), *distiller.describe()]))


def _named(distiller: Distiller) -> list[tuple[str, nn.Module]]:
    return [(paired.name, paired.adapter.model) for paired in distiller.frozen_teachers]


def _class_names(subject: Subject) -> list[str]:
    dataset = subject.train_set if subject.train_set is not None else subject.val_set
    if dataset is None:
        raise ConfigError("the number of classes is unknown without data")
    return dataset.class_names


def _alone(config: Config) -> Config:
    return config.model_copy(update={"distill": replace(config.distill, enabled=False), "teacher": None})


def _fit(key: str, teacher: Teacher, class_names: list[str]) -> Finding:
    """How much of the teacher of that section the weights file fills."""
    try:
        return _filled(key, teacher, class_names)
    except Exception as error:
        return problem(describe_error(error), f"train the teacher first (--role teacher), or mend {key}.weights")


def _filled(key: str, teacher: Teacher, class_names: list[str]) -> Finding:
    weights = teacher.weights
    if weights is None:
        raise ConfigError(f"{key}.weights: required, a distilled run needs a trained teacher")
    if weights == "DEFAULT":
        return ok(
            f"{key}.weights DEFAULT: torchvision's own, whole but for the head, of which the outputs of your "
            f"{len(class_names)} classes are taken"
        )
    state = checkpoint.load_any(weights)
    spec, classes = teacher.model, checkpoint.classes_of(state) or class_names
    if state.get("format") == checkpoint.FORMAT:
        spec = stored_config(state, weights).student
    if spec is None:
        raise ConfigError(f"{key}.model: required, because {weights} does not say what model it belongs to")
    bare = spec.model_copy(update={"weights": None, "new_head": False, "backbone_weights": None})
    with torch.device("meta"):  # names and shapes are all that is compared
        wanted = build_model(bare, len(classes)).state_dict()
    return _compare(wanted, state.get("model", state), weights)


def _compare(wanted: dict[str, Any], given: dict[str, Any], weights: str) -> Finding:
    # Files made with frozen BatchNorm lack this counter, which nothing reads.
    wanted = {name: value for name, value in wanted.items() if not name.endswith("num_batches_tracked")}
    given = {name: value for name, value in given.items() if not name.endswith("num_batches_tracked")}
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    shapes = [
        f"{name} ({tuple(given[name].shape)} in the file, {tuple(value.shape)} in the model)"
        for name, value in wanted.items()
        if name in given and given[name].shape != value.shape
    ]
    matched = [value for name, value in wanted.items() if name in given and given[name].shape == value.shape]
    tensors = len(matched) / len(wanted)
    parameters = sum(value.numel() for value in matched) / sum(value.numel() for value in wanted.values())
    count = f"{len(matched)} of the teacher's {len(wanted)} tensors ({tensors:.0%})"
    text = f"{weights} fills {count}, {parameters:.1%} of its parameters"
    numbers = {
        "tensors": tensors,
        "parameters": parameters,
        "missing": missing,
        "unexpected": unexpected,
        "of_another_shape": shapes,
    }
    wrong = [
        f"{len(names)} {what}: {first(names, 3)}"
        for names, what in ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
        if names
    ]
    if not wrong:
        return ok(text, **numbers)
    head = shapes and not missing and not unexpected and all("box_predictor" in name for name in shapes)
    advice = "is teacher.model the model that this file is of?"
    return problem(f"{text}; {'; '.join(wrong)}", "the file has other classes" if head else advice, **numbers)


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
        self.teacher, self.classes = teacher, classes

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self.classes.detections(found) for found in self.teacher(images)]


def _teacher_precision(
    paired: FrozenTeacher, student: dict[str, float | None], batches: Any, dataset: Any
) -> Iterator[Finding]:
    """``student``: its AP by class."""
    name, model, classes = paired.name, paired.adapter.model, paired.classes
    found = evaluate(model if classes is None else InTheStudentsLabels(model, classes), batches, dataset)
    taught = dataset.class_names if classes is None else classes.taught
    partial = len(taught) < len(dataset.class_names)
    scores = {one: found["per_class"][one] for one in taught if found["per_class"][one] is not None}
    if not scores:
        yield warning(
            f"these images hold no object of what {name} teaches: {first(taught)}",
            "raise --images: it could not be looked at",
        )
        return
    ours, theirs = fmean(student[one] for one in scores), fmean(scores.values())
    of_these = f" over the {len(taught)} classes that it teaches" if partial else ""
    text = f"{name} has AP {theirs:.1f} on the same{of_these}"
    numbers = {"AP": theirs, "per_class": scores}
    zeros = [one for one, value in scores.items() if value == 0]
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
