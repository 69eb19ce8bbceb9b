"""The description of one run: a YAML file, dotted overrides, and the checked settings they give.

A wrong key or value is an error that names the key, the file or override it came from, and what was expected.
"""

from __future__ import annotations

import difflib
import reprlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from tardkd.distill import DistillSettings
from tardkd.train.bounds import Count, Factor, Images, Pixels, Seed, Text, Threads, Workers
from tardkd.train.models import ModelSpec
from tardkd.train.plain_yaml import DEEPEST, LONGEST, PlainYamlError, read_yaml
from tardkd.train.roles import Role

VARIANTS = ("coco", "voc", "scenes", "one", "several")  # the kinds of a data section, and of a teacher section


MOST_PROBLEMS = 50  # that are described at once


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and where it was set."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Split(Section):
    """One split of a COCO-format data set; both paths are relative to ``data.root``."""

    images: Text  # the folder of the image files
    annotations: Text  # the COCO JSON file


OnBadImage = Literal["error", "skip"]


class CocoData(Section):
    """Images and COCO JSON files."""

    kind: Literal["coco"]  # the data set is in COCO format
    root: Text  # the folder that all other paths start from
    train: Split  # what the student learns from
    val: Split  # what is evaluated during training
    test: Split | None = None  # what tardkd eval --split test evaluates
    on_bad_image: OnBadImage = "error"  # skip: train on the next good image instead, evaluate the bad one as empty


class VocData(Section):
    """A Pascal VOC folder; train, val and test are names of its ``ImageSets/Main`` lists."""

    kind: Literal["voc"]  # the data set is a Pascal VOC folder
    root: Text  # the path of that folder
    train: Text = "train"  # the list in ImageSets/Main of the images to learn from
    val: Text = "val"  # the list of those that are evaluated during training
    test: Text | None = None  # the list for tardkd eval --split test
    classes: tuple[Text, ...] | None = None  # names in the order of the labels; None: all in the folder, by alphabet
    on_bad_image: OnBadImage = "error"  # skip: train on the next good image instead, evaluate the bad one as empty


class SceneData(Section):
    """The built-in scenes; train, val and test are numbers of images."""

    kind: Literal["scenes"]  # images are drawn as they are needed, so that no data is
    image_size: Pixels = 192  # height and width of an image in pixels
    train: Images = 400  # how many images there are to learn from
    val: Images = 200  # how many are evaluated during training
    test: Images | None = None  # how many there are for tardkd eval --split test
    seed: Seed = 0  # decides what is on the images


class Augment(Section):
    """Random views of the training images; see tardkd.data.transforms.build_transform."""

    flip: Annotated[float, Field(ge=0, le=1)] = 0.5  # probability of a mirror image
    scale: tuple[Factor, Factor] = (1.0, 1.0)  # smallest and largest factor of the content's size
    shift: Annotated[float, Field(ge=0, lt=1)] = 0.0  # largest displacement, as a share of the sides
    photometric: bool = False  # random brightness, contrast, saturation, hue and channel order
    zoom_out: Annotated[float, Field(ge=1, le=16)] = 1.0  # half the images on a canvas up to so much longer (SSD: 4)
    iou_crop: bool = False  # SSD's crop, which holds an object's centre
    large_scale_jitter: tuple[Factor, Factor] | None = None  # resizes, e.g. by [0.1, 2]; crops or fills

    @model_validator(mode="after")
    def _ordered(self) -> Augment:
        for name in ("scale", "large_scale_jitter"):
            factors = getattr(self, name)
            if factors is not None and factors[0] > factors[1]:
                raise ValueError(f"{name} must be [smallest, largest], got {list(factors)}")
        return self


class Teacher(Section):
    """A frozen model that helps the student.

    Its `weights` are one of tardkd's checkpoints, a plain state dict, or DEFAULT for torchvision's own. A checkpoint
    says itself which model it is of; for the others `model` does, and that is also what the role `teacher` trains. The
    teacher's classes teach the student's of the same name; `classes` pairs others, or takes one out with null.
    """

    weights: Text | None = None  # a file or DEFAULT; null with --role distilled: from the recipe's own teacher run
    model: ModelSpec | None = None  # what the weights are of, where they do not say so; what the role teacher trains
    classes: dict[Text, Text | None] | None = None  # a class of the teacher's: the student's class that it teaches
    compile: bool = False  # compile its backbone, which takes minutes at the start and saves time in long trainings


def _how_many(teacher: Any) -> str:
    return "several" if isinstance(teacher, (list, tuple)) else "one"


Several = Annotated[tuple[Teacher, ...], Field(min_length=1)]
Teachers = Annotated[Annotated[Teacher, Tag("one")] | Annotated[Several, Tag("several")], Discriminator(_how_many)]


@dataclass(frozen=True)
class Distill(DistillSettings):
    """`DistillSettings` and a switch: ``enabled: false`` trains exactly the plain detector."""

    enabled: bool = True  # false: the student trains without a teacher


class Optimizer(Section):
    """The step rule and its learning rate over time."""

    kind: Literal["sgd", "adamw"] = "sgd"  # the step rule, as torch implements it
    lr: PositiveFloat = 0.02  # learning rate after the warm-up; it is not scaled by the size of the batch
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # momentum of sgd
    weight_decay: NonNegativeFloat = 1e-4  # decay of all parameters
    clip_norm: PositiveFloat | None = None  # longest norm of the gradient of all parameters; null: no limit
    warmup: Annotated[int, Field(ge=0, le=10**9)] = 0  # iterations over which the rate rises linearly
    warmup_factor: Annotated[float, Field(gt=0, le=1)] = 1e-3  # share of the rate that the warm-up begins with
    schedule: Literal["constant", "multistep", "cosine"] = "constant"  # the rate after warm-up; cosine ends at 0
    milestones: tuple[Count, ...] = ()  # epochs after which multistep multiplies the rate by gamma
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1  # factor of the rate at each milestone of multistep

    @model_validator(mode="after")
    def _milestones_match(self) -> Optimizer:
        if (self.schedule == "multistep") != bool(self.milestones):
            raise ValueError(
                f"milestones go with schedule multistep: got schedule {self.schedule} "
                f"and milestones {list(self.milestones)}"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must increase, got {list(self.milestones)}")
        return self


class Train(Section):
    """How long, on what and how exactly the loop trains."""

    epochs: Count  # passes over the training images
    batch_size: Count = 2  # images of a step, of all processes together
    accumulate: Count = 1  # in how many parts a process takes its share of a step, to save memory
    seed: Seed = 0  # decides the first weights, the order, the views and the choice of regions
    amp: Literal["none", "bf16", "fp16"] = "none"  # precision of autocast; fp16 comes with a gradient scaler
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # evaluate an average of the weights with this decay
    sync_bn: bool = False  # share BatchNorm's statistics among all processes, which works on GPUs alone
    on_non_finite: Literal["stop", "skip"] = "stop"  # on a loss that is not finite; the 10th skip in a row stops too
    channels_last: bool = False  # memory format of student and teachers, faster on most machines
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto: on CUDA where torch finds it
    threads: Threads | None = None  # threads of the CPU; null: as many as torch takes
    workers: Workers = 0  # processes that load images, for each process that trains
    group_by_aspect: bool = True  # keep wide images apart from others, so that batches need less padding
    eval_every: Count = 1  # epochs between evaluations; the last epoch is always evaluated
    save_every: Count | None = None  # iterations between checkpoints within an epoch; each epoch's end has one
    log_every: Count = 20  # iterations between lines when the output is not a terminal


class Config(Section):
    """All that a recipe says."""

    data: Annotated[CocoData | VocData | SceneData, Field(discriminator="kind")]  # images and their objects
    augment: Augment = Augment()  # random views of the training images
    student: ModelSpec  # the detector to train
    teacher: Teachers | None = None  # the frozen one that helps, or a list of them, each for classes of its own
    distill: Distill = Distill()  # what is transferred, and how much it weighs
    optimizer: Optimizer = Optimizer()  # the step rule and its learning rate
    train: Train  # how long, on what and how exactly
    output: Text  # the run's folder; made if it is not there

    @model_validator(mode="after")
    def _teacher_present(self) -> Config:
        if self.distill.enabled and self.teacher is None:
            raise ValueError(
                "distill.enabled is true but there is no teacher section; add one, or set distill.enabled: false"
            )
        return self

    @property
    def teachers(self) -> dict[str, Teacher]:
        """The teacher sections by their keys: "teacher", or "teacher.0", "teacher.1" and so on; empty without one."""
        if isinstance(self.teacher, tuple):
            return {f"teacher.{i}": teacher for i, teacher in enumerate(self.teacher)}
        return {} if self.teacher is None else {"teacher": self.teacher}

    def plain(self) -> dict[str, Any]:
        """The configuration as nested dicts, lists and plain values, which a checkpoint or a YAML file can hold."""
        return self.model_dump(mode="json")

    def for_role(self, role: Role) -> Config:
        """The same recipe with one of its three parts to play.

        ``teacher`` trains the teacher's model alone, ``baseline`` the student alone, ``distilled`` the student with
        the teacher. Each gets its own folder under `output`; a recipe that names no teacher weights takes those
        that its own teacher run leaves there. Of several teachers, one alone may be without weights: that one.
        """
        parts = self.plain()
        parts["output"] = str(Path(self.output) / role)
        if role != "distilled":
            parts["distill"]["enabled"] = False
            parts["teacher"] = None
        if role == "teacher":
            key = self._own_teacher()
            if key is None or self.teachers[key].model is None:
                raise ConfigError(
                    f"role teacher needs {key or 'teacher'}.model in the recipe, and no weights if it is one of several"
                )
            parts["student"] = self.teachers[key].model.model_dump(mode="json")
        if role == "distilled":
            if not self.teachers:
                raise ConfigError("role distilled needs a teacher section in the recipe")
            parts["distill"]["enabled"] = True
            sections = parts["teacher"] if isinstance(self.teacher, tuple) else [parts["teacher"]]
            for key, section in zip(self.teachers, sections):
                if key == self._own_teacher():
                    section["weights"] = section["weights"] or str(Path(self.output) / "teacher" / "last.pt")
        return Config.model_validate(parts)

    def _own_teacher(self) -> str | None:
        """The key of the teacher that role teacher trains: the only one, or of several the one without weights."""
        keys = [key for key, teacher in self.teachers.items() if len(self.teachers) == 1 or not teacher.weights]
        if len(keys) > 1:
            raise ConfigError(f"only one of several teachers may be without weights, and {', '.join(keys)} are")
        return keys[0] if keys else None


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a recipe and apply overrides such as ``optimizer.lr=0.01``; raises ConfigError."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from None
    tree = _read_yaml(text, f"{path} is not valid YAML")
    return parse_config(tree, overrides, source=str(path))


def parse_config(tree: Any, overrides: list[str] | tuple[str, ...] = (), *, source: str) -> Config:
    """Check a tree of plain dicts, with overrides applied; `source` names it in errors."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} must hold a mapping of sections, got {type(tree).__name__}")
    overridden = [_apply_override(tree, override) for override in overrides]
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        problems = error.errors()
        lines = [_describe(problem, source, overridden) for problem in problems[:MOST_PROBLEMS]]
        if len(problems) > MOST_PROBLEMS:
            lines.append(f"{source}: and {len(problems) - MOST_PROBLEMS} more such problems")
        raise ConfigError("\n".join(lines)) from None


def _read_yaml(text: str, problem: str) -> Any:
    try:
        return read_yaml(text)
    except PlainYamlError as error:
        raise ConfigError(f"{problem}: {error}") from None


def _apply_override(tree: dict, override: str) -> str:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")) or key.count(".") >= DEEPEST:
        raise ConfigError(f"override {override!r} must have the form section.key=value")
    problem = f"override {override!r}: the value is not valid YAML"
    value = _read_yaml(text, problem) if text else ""
    *parents, last = key.split(".")
    for name in parents:
        place = _place(tree, name, override)
        section = tree.get(name) if isinstance(tree, dict) else tree[place]
        if section is None:
            section = {}
        if not isinstance(section, (dict, list)):
            raise ConfigError(f"override {override!r}: {name} is not a section")
        tree[place] = section = section.copy()  # an alias in the YAML may have put the same section in two places
        tree = section
    tree[_place(tree, last, override)] = value
    return key


def _place(tree: dict | list, name: str, override: str) -> str | int:
    """The key or index of `name` in `tree`: in a list, such as that of teachers, names are places from 0."""
    if isinstance(tree, dict):
        return name
    if not (name.isdecimal() and int(name) < len(tree)):
        raise ConfigError(f"override {override!r}: {name} is no place in a list of {len(tree)}, which count from 0")
    return int(name)


def _describe(problem: Any, source: str, overridden: list[str]) -> str:
    # The variant of a section that pydantic puts into the path is not a key that the user wrote.
    path = list(problem["loc"])
    if path[:1] in (["data"], ["teacher"]) and path[1:2] and path[1] in VARIANTS:
        del path[1]
    location = list(map(str, path))
    key = ".".join(location)
    where = "override" if any(key == name or key.startswith(name + ".") for name in overridden) else source
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys here: {', '.join(known)}"
        return f"{where}: {key}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{where}: {key}: required, but not given"
    message = problem["msg"].removeprefix("Value error, ")
    got = "" if isinstance(problem["input"], dict) or not key else f", got {_shown(problem['input'])}"
    return f"{where}: {key}: {message}{got}" if key else f"{where}: {message}"


def _shown(value: Any) -> str:
    """The value in at most 200 characters and little more time, whatever lists of lists of lists it is."""
    try:
        text = SHORT.repr(value)
    except ValueError:  # Python writes out no integer of thousands of digits
        return "a number too large"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _short_repr() -> reprlib.Repr:
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxtuple, short.maxdict = 4, 20, 20, 20
    short.maxstring = short.maxother = short.maxlong = 300
    return short


SHORT = _short_repr()


@cache
def _schema() -> dict[str, Any]:
    return TypeAdapter(Config).json_schema()


def _known_keys(location: list[str]) -> list[str]:
    """The keys that a section of the configuration takes, from the schema."""
    schema = _schema()
    options = [schema]
    for part in location:
        if part.isdecimal():
            continue  # a place in a list, whose items _resolve has found already
        options = [_resolve(schema, option["properties"][part]) for option in options if part in option["properties"]]
        options = [option for group in options for option in group]
    return sorted({key for option in options for key in option["properties"]})


def _resolve(schema: dict, node: dict) -> list[dict]:
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].split("/")[-1]]
    if "properties" in node:
        return [node]
    options = [node["items"]] if "items" in node else node.get("anyOf", node.get("oneOf", []))
    return [section for option in options for section in _resolve(schema, option)]
