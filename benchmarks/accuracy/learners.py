"""What trains in a run: the student alone, with tardkd's help, or with that of a loss of another paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tardkd.detectors import for_model
from tardkd.detectors.base import Batch, Detector, StudentPass, TeacherPass
from tardkd.distill import Distiller, DistillSettings
from tardkd.distill.adapters import make_adapter, make_adapters

from .anchors import level_anchors
from .crosskd import CrossKD
from .literature import LOSSES, OF_TWO_STAGES, Step

Targets = Sequence[dict[str, Tensor]]


@dataclass(frozen=True)
class Method:
    """How a student learns."""

    settings: DistillSettings | None = None  # tardkd's; None: it is not tardkd that helps
    loss: str | None = None  # crosskd or a key of LOSSES, alone or beside tardkd's terms; with neither, alone
    weight: float = 1.0  # factor of the loss's own weight
    share: float | None = None  # each term's pull as a share of the detector's; None: the weights are as written down
    lasting: bool = False  # keep that share throughout
    time: float = 1.0  # factor of the number of epochs

    @property
    def needs_teacher(self) -> bool:
        """Whether anything helps the student."""
        return self.settings is not None or self.loss is not None

    def scaled(self, factor: float) -> Method:
        """The same with so many times the help."""
        if self.share is not None:
            return replace(self, share=self.share * factor)
        if self.settings is not None:
            weights = {name: weight * factor for name, weight in self.settings.weights.items()}
            return replace(self, settings=replace(self.settings, **weights))
        return replace(self, weight=self.weight * factor)


class Learner(Protocol):
    """A module whose parameters are what an optimizer moves."""

    student: nn.Module
    stats: dict[str, Tensor]  # scalars () of the last step
    weight: float  # lambda, the schedule's weight of the help

    def start(self, total_epochs: int, steps_per_epoch: int) -> None: ...

    def set_progress(self, epoch: int, step: int) -> None: ...

    def learn(self, images: Sequence[Tensor], targets: Targets) -> tuple[StudentPass, dict[str, Tensor]]:
        """The student's pass on images N x (3, H, W), and all losses (), those of the help named ``distill_*``."""


def build_learner(
    method: Method, student: nn.Module, teacher: nn.Module | None, classes: Sequence[str] | None = None
) -> nn.Module:
    """The learner of a method; whatever it draws leaves the generator as it was, so that students start alike.

    Args:
        classes: the names of both models' classes, for pairs of families that count them differently.
    """
    with torch.random.fork_rng(devices=[]):
        if not method.needs_teacher:
            return Alone(student)
        assert teacher is not None, "this method needs a teacher"
        if method.settings is None:
            return Imitator(student, teacher, method)
        return (Helped if method.loss is None else Both)(student, teacher, method, classes)


class Alone(nn.Module):
    """The student and its own losses."""

    weight = 1.0

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student, self._detector = student, for_model(student)
        self.stats: dict[str, Tensor] = {}

    def start(self, total_epochs: int, steps_per_epoch: int) -> None:
        pass

    def set_progress(self, epoch: int, step: int) -> None:
        pass

    def learn(self, images: Sequence[Tensor], targets: Targets) -> tuple[StudentPass, dict[str, Tensor]]:
        student_pass = self._detector.student_pass(self._detector.read_call(images, targets))
        return student_pass, student_pass.losses


class Imitator(Alone):
    """The student and a loss of another paper; the teacher is no part of the module."""

    def __init__(self, student: nn.Module, teacher: nn.Module, method: Method) -> None:
        super().__init__(student)
        self._teacher = for_model(teacher.eval().requires_grad_(False))
        self.imitation = build_imitation(student, teacher, method)

    def learn(self, images: Sequence[Tensor], targets: Targets) -> tuple[StudentPass, dict[str, Tensor]]:
        student_pass = self._detector.student_pass(self._detector.read_call(images, targets))
        with torch.no_grad():
            ratio = self._teacher.input_size / self._detector.input_size
            teacher_pass = self._teacher.teacher_pass(images, student_pass.inputs, ratio)
        return student_pass, {**student_pass.losses, "distill_term": self.imitation(student_pass, teacher_pass)}


class Helped(Distiller):
    """The student and tardkd's terms."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, method: Method, classes: Sequence[str] | None = None
    ) -> None:
        super().__init__(student, teacher, method.settings, student_classes=classes, teacher_classes=classes)

    def learn(self, images: Sequence[Tensor], targets: Targets) -> tuple[StudentPass, dict[str, Tensor]]:
        return self.step(self.detector.read_call(images, targets))


class Both(Helped):
    """tardkd's terms, and a loss of another paper beside them."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, method: Method, classes: Sequence[str] | None = None
    ) -> None:
        super().__init__(student, teacher, method, classes)
        self.imitation = build_imitation(student, teacher, method)

    def _run_models(self, batch: Batch) -> tuple[StudentPass, list[TeacherPass]]:
        self._passes = super()._run_models(batch)
        return self._passes

    def learn(self, images: Sequence[Tensor], targets: Targets) -> tuple[StudentPass, dict[str, Tensor]]:
        student_pass, losses = super().learn(images, targets)
        _, [teacher_pass] = self._passes
        return student_pass, {**losses, "distill_term": self.weight * self.imitation(student_pass, teacher_pass)}


def build_imitation(student: nn.Module, teacher: nn.Module, method: Method) -> nn.Module:
    """A module whose call with a pass of the student and one of the teacher is the loss () of another paper."""
    if method.loss == "crosskd":
        return CrossKD(student, teacher, method.weight)
    return Imitation(student, teacher, method)


class Imitation(nn.Module):
    """A loss of another paper, and the adapters that bring the student's maps to the teacher's channels.

    It compares the levels of equal stride. Where all of the student's have the same channels, one adapter serves them.

    Raises:
        ValueError: the loss looks at what these models have not, or no two levels have an equal stride.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, method: Method) -> None:
        super().__init__()
        self._student, self._teacher = for_model(student), for_model(teacher)
        if method.loss in OF_TWO_STAGES and not (self._student.two_stage and self._teacher.two_stage):
            kinds = f"{type(student).__name__} and {type(teacher).__name__}"
            raise ValueError(f"{method.loss} needs two Faster R-CNNs, for their {OF_TWO_STAGES[method.loss]}: {kinds}")
        self.levels = levels_of_equal_stride(self._student, self._teacher)
        ours = [self._student.channels[level] for level, _ in self.levels]
        theirs = [self._teacher.channels[level] for _, level in self.levels]
        like = next(student.parameters())
        if len({*ours}) == len({*theirs}) == 1:
            self.adapters = nn.ModuleList([make_adapter(ours[0], theirs[0], like)] * len(ours))
        else:
            self.adapters = make_adapters(ours, theirs, like)
        self.loss = LOSSES[method.loss](theirs[0], len(theirs))
        self.weight = method.weight

    def forward(self, student_pass: StudentPass, teacher_pass: TeacherPass) -> Tensor:
        regions = student_pass.regions

        @torch.no_grad()
        def answer() -> Tensor:
            return self._teacher.answers(teacher_pass, regions, regions.labels - 1).logits

        def anchors() -> list[Tensor]:
            return level_anchors(self._student.model, student_pass.inputs, student_pass.features)

        step = Step(
            student=[adapt(student_pass.features[ours]) for adapt, (ours, _) in zip(self.adapters, self.levels)],
            teacher=[
                resize_map(teacher_pass.features[theirs], student_pass.features[ours].shape[-2:])
                for ours, theirs in self.levels
            ],
            scales=[student_pass.scales[ours] for ours, _ in self.levels],
            boxes=[target["boxes"] for target in student_pass.targets],
            anchors=anchors,
            logits=regions.head.logits,
            labels=regions.labels,
            answer=answer,
        )
        return self.weight * self.loss(step)


def resize_map(level: Tensor, size: Sequence[int]) -> Tensor:
    """A map (N, C, H, W) of a teacher with another input, brought to the student's (H, W) = ``size``."""
    if level.shape[-2:] == tuple(size):
        return level
    return F.interpolate(level, size=tuple(size), mode="bilinear", align_corners=False)


def levels_of_equal_stride(student: Detector, teacher: Detector) -> list[tuple[int, int]]:
    """The student's level and the teacher's, of each stride that both have.

    Raises:
        ValueError: there is none.
    """
    pairs = [
        (ours, theirs)
        for ours, stride in enumerate(student.strides)
        for theirs, other in enumerate(teacher.strides)
        if stride == other
    ]
    if not pairs:
        raise ValueError(f"no level to compare: strides {student.strides} of the student, {teacher.strides}")
    return pairs
