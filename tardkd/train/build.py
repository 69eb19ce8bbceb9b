"""From a configuration to the parts of a run: data sets, models, and the distiller that trains."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision.models import get_model_weights

from tardkd import distill
from tardkd.data import CocoDetection, Scenes, VocDetection
from tardkd.data.transforms import build_transform
from tardkd.detectors import for_model
from tardkd.distill import Distiller
from tardkd.train import checkpoint
from tardkd.train.config import Config, ConfigError, SceneData, Teacher, VocData, parse_config
from tardkd.train.models import ModelSpec, build_model, load
from tardkd.train.own_models import check_named
from tardkd.weights import Weights, check_finite, fill, from_content, read


def build_dataset(config: Config, split: str, *, augment: bool = False) -> Dataset:
    """The `train`, `val` or `test` split; `augment` adds the training transforms."""
    chosen = getattr(config.data, split)
    if chosen is None:
        raise ConfigError(f"data.{split}: required here, but not given")
    transform = build_transform(**config.augment.model_dump()) if augment else None
    if isinstance(config.data, SceneData):
        return Scenes(chosen, config.data.image_size, config.data.seed, transform, split=split)
    root = Path(config.data.root)
    instead = "replace" if augment else "blank"  # an evaluation must not see an image twice
    settings = {"transform": transform, "on_bad_image": instead if config.data.on_bad_image == "skip" else "error"}
    if isinstance(config.data, VocData):
        dataset: Dataset = VocDetection(root, chosen, config.data.classes, **settings)
    else:
        dataset = CocoDetection(root / chosen.images, root / chosen.annotations, **settings)
    if not len(dataset):
        raise ConfigError(f"data.{split} has no images")
    return dataset


def fit_images(dataset: Any, *models: nn.Module, crop: float = 1.0) -> None:
    """Let images count as unreadable of which the resizing of one of these models would leave nothing.

    `crop` is the smallest share of a side that a training view may keep.

    Raises:
        ValueError: there is one, and the recipe does not say ``on_bad_image: skip``.
    """
    dataset.limit_aspect(crop * min(detector.longest_aspect for detector in map(for_model, models)))


def check_classes(left: str, left_names: list[str], right: str, right_names: list[str]) -> None:
    """Refuse two things that must have the same classes in the same order, each called by its name."""
    if left_names != right_names:
        raise ConfigError(f"{left} has the classes {left_names}, {right} has {right_names}")


def build_distiller(
    config: Config, class_names: list[str], files: Mapping[str, TeacherFile] | None = None
) -> Distiller:
    """Student, frozen teachers and adapters.

    The student's first weights depend on the seed alone, and the generators are left in the same state whether or
    not there is a teacher, so that a baseline and a distilled run differ by nothing but the distillation.

    Args:
        class_names: the data set's, in the order of the labels.
        files: what ``read_teacher`` found, by the key of the section, where the caller has read it already.
    """
    spec, weights = _first_weights(config.student, class_names)
    seed_generators(config.train.seed)
    distiller = pair(config, build_model(spec, len(class_names), weights), class_names, files)
    seed_generators(config.train.seed + 1)
    return distiller


def pair(
    config: Config, student: nn.Module, class_names: list[str], files: Mapping[str, TeacherFile] | None = None
) -> Distiller:
    """A distiller of that student and the configuration's teachers; `files` as in :func:`build_distiller`."""
    sections = config.teachers if config.distill.enabled else {}
    teachers = [
        distill.Teacher(*load_teacher(section, class_names, key, (files or {}).get(key)), section.classes)
        for key, section in sections.items()
    ]
    settings = config.distill
    if config.train.on_non_finite == "skip":  # which looks at the losses of all processes, when they have all got there
        settings = replace(settings, check_finite=False)
    return Distiller(student, teachers, settings, enabled=settings.enabled, student_classes=class_names)


def start_from(config: Config, weights: str | None) -> Config:
    """`config` with a student whose training starts from all of `weights`: see tardkd.weights.read."""
    student = config.student.model_copy(update={"weights": weights, "backbone_weights": None})
    return config.model_copy(update={"student": student})


def place(config: Config, distiller: Distiller, device: torch.device, *, compiled: bool = True) -> None:
    """Bring student, teachers and adapters to the device, as the recipe says; `compiled`: teachers that it wants so."""
    for module in (distiller, *distiller.teachers):
        module.to(device)
        if config.train.channels_last:
            module.to(memory_format=torch.channels_last)
    for section, teacher in zip(config.teachers.values(), distiller.frozen_teachers):
        if section.compile and compiled:
            teacher.detector.backbone.compile(dynamic=True)


def _first_weights(spec: ModelSpec, class_names: list[str]) -> tuple[ModelSpec, Weights | None]:
    """What the student starts from, read once; None where that is not a file.

    The head is taken over from weights that tell these very classes alone: that of as many others would fit without a
    word.
    """
    if spec.weights in (None, "DEFAULT"):
        return spec, None
    weights = read(spec.weights)
    if weights.classes == class_names:
        return spec.model_copy(update={"new_head": False}), weights
    if weights.classes is not None and not spec.new_head:
        raise ConfigError(
            f"student.weights {spec.weights} has the classes {weights.classes}, the data set has {class_names}; "
            "student.new_head=true takes all but the class and box predictor"
        )
    return spec, weights


@dataclass(frozen=True)
class TeacherFile:
    """A file of a teacher's weights, and the detector that it is of."""

    weights: Weights
    spec: ModelSpec
    classes: list[str]  # the data set's where the file does not tell them


def read_teacher(teacher: Teacher, class_names: list[str], key: str = "teacher") -> TeacherFile | None:
    """Read the file of the section called `key`; None where torchvision's own weights are wanted.

    Raises:
        CheckpointError: the file cannot be read.
        ConfigError: the section names no weights, or neither it nor the file names a model.
    """
    if teacher.weights is None:
        raise ConfigError(f"{key}.weights: required, a distilled run needs a trained teacher")
    if teacher.weights == "DEFAULT":
        return None
    weights, spec = read(teacher.weights), teacher.model
    check_finite(weights.tensors, teacher.weights)
    if weights.content.get("format") == checkpoint.FORMAT:
        stored = stored_config(weights.content, teacher.weights).student
        check_named(stored.model, teacher.weights, None if spec is None else spec.model)
        spec = stored
    if spec is None:
        raise ConfigError(f"{key}.model: required, because {teacher.weights} does not say what model it belongs to")
    return TeacherFile(weights, _with_weights(spec, teacher.weights), weights.classes or class_names)


def load_teacher(
    teacher: Teacher, class_names: list[str], key: str = "teacher", file: TeacherFile | None = None
) -> tuple[nn.Module, list[str]]:
    """The teacher with its trained weights, and its classes.

    `key` names the section of the configuration in errors; `file` is what ``read_teacher`` found, if it was called.
    """
    file = file or read_teacher(teacher, class_names, key)
    if file is not None:
        return build_model(file.spec, len(file.classes), file.weights), file.classes
    if teacher.model is None:
        raise ConfigError(f"{key}.model: required, {key}.weights DEFAULT does not say which model")
    return _torchvision_teacher(teacher.model, list(dict.fromkeys([*class_names, *(teacher.classes or ())])))


def _torchvision_teacher(spec: ModelSpec, wanted: list[str]) -> tuple[nn.Module, list[str]]:
    """Torchvision's trained detector, its head cut down to those of the `wanted` classes that it knows, and these.

    The published heads have 91 outputs, COCO's category ids with their gaps, where a data set's labels have none.
    """
    weights = get_model_weights(spec.name).DEFAULT
    categories = weights.meta["categories"]
    class_names = [name for name in wanted if name in categories]
    if not class_names:
        raise ConfigError(f"torchvision's {spec.name} knows none of the classes {', '.join(wanted)}")
    columns = [0, *map(categories.index, class_names)]  # 0: background
    model = build_model(_with_weights(spec, None), len(class_names))
    state = for_model(model).of_classes(weights.get_state_dict(progress=True), columns, len(categories))
    load(model, from_content(state, f"torchvision's {spec.name}"))
    return model, class_names


def load_student(state: dict[str, Any], path: str | Path) -> nn.Module:
    """The trained model of one of our checkpoints.

    Raises:
        CheckpointError: what it needs is missing from the checkpoint, or its weights are not finite.
        MisfitError: the tensors are not those of the model that its configuration describes.
    """
    checkpoint.check_trained(state, path)
    check_finite(state["model"], str(path))
    spec = stored_config(state, path).student
    check_named(spec.model, path)
    model = build_model(_with_weights(spec, None), len(state["classes"]))
    fill(model, from_content(state, str(path)), called="the student")
    return model


def stored_config(state: Mapping[str, Any], path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration that a checkpoint was trained with."""
    checkpoint.require(state, path, "config", dict, "the configuration of its run")
    return parse_config(state["config"], overrides, source=str(path))


def seed_generators(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _with_weights(spec: ModelSpec, weights: str | None) -> ModelSpec:
    """`spec` starting from all of `weights` in place of what a training starts from."""
    return spec.model_copy(update={"weights": weights, "new_head": False, "backbone_weights": None})
