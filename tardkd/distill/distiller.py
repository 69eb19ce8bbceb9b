"""A student that trains with a teacher's help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tardkd.detectors import for_model
from tardkd.detectors.base import InputBatch, Regions, StudentPass, TeacherPass
from tardkd.device import join_beside
from tardkd.ops import RegionLosses

from . import checks
from .adapters import make_adapter
from .normalise import share_of_all
from .schedule import Schedule
from .settings import DistillSettings
from .sharing import foreground, region_stats, share_regions
from .teachers import FrozenTeacher, joint_gaussian_loss, joint_region_losses, pair_teachers

REGION_TERMS = ("feature", "classification", "regression")


class Distiller(nn.Module):
    """Student and channel adapters as one trainable module, beside a frozen teacher.

    >>> distiller = Distiller(student, teacher, DistillSettings())
    >>> losses = distiller(images, targets)
    >>> sum(losses.values()).backward()

    The teacher is a plain attribute: eval, without gradients (it is frozen in place), in no
    ``state_dict()``, ``parameters()`` or ``modules()``; it follows the student's device by itself. So
    optimizers, DDP and checkpoints see the student (``student.*``) and the adapters (``adapters.*``) only.
    Every parameter gets a gradient in every step, also when the schedule has ended, as DDP wants it.

    Label sets may differ: classes of the same name are matched, ``class_map`` pairs others, and only these are
    transferred (see :class:`tardkd.distill.classes.ClassMap`). Several teachers each teach classes of their own: a
    region is compared with the teacher of its class alone, a background region, where a gate lets it through, with
    every teacher; each term is then the mean over the open gates of all teachers (``gaussian``: over all objects).

    Args:
        student: a detector of a family that :mod:`tardkd.detectors` knows.
        teacher: another one, or a list of them. Channels, levels, strides, input size and normalisation may differ.
            May be None with ``enabled=False``.
        settings: weights, gates, losses, schedule; for all teachers.
        enabled: False makes this exactly the student: same losses, same random numbers, no teacher, no
            adapters.
        student_classes, teacher_classes: class names in the order of the labels, without the background; for several
            teachers a list of such lists. Without them the classes must be the same, in the same order.
        class_map: teacher's class name to student's, or to None: not transferred. It comes before equal names. For
            several teachers a list, None where there is nothing to map.

    Raises:
        TypeError: a model of an unknown family.
        ValueError: the models cannot be paired; names both sides.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module] | None,
        settings: DistillSettings | None = None,
        *,
        enabled: bool = True,
        student_classes: Sequence[str] | None = None,
        teacher_classes: Sequence[str] | Sequence[Sequence[str]] | None = None,
        class_map: Mapping[str, str | None] | Sequence[Mapping[str, str | None] | None] | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings if settings is not None else DistillSettings()
        self.enabled = enabled
        self.schedule = Schedule(self.settings.schedule)
        self.stats: dict[str, Tensor] = {}
        self.student = student
        self.student_classes = student_classes
        self.adapters = nn.ModuleDict()
        self._teachers: list[FrozenTeacher] = []
        self._check_finite = checks.FiniteCheck()
        if enabled:
            if teacher is None or (isinstance(teacher, Sequence) and not teacher):
                raise ValueError("a Distiller with enabled=True needs a teacher")
            self._student = for_model(student)
            names = (student_classes, teacher_classes, class_map)
            self._teachers = pair_teachers(self._student, teacher, self.settings, *names)
            if self.settings.feature or self.settings.gaussian:
                like = next(student.parameters())
                for paired in self._teachers:
                    channels = paired.adapter.channels
                    self.adapters[paired.adapter_key] = make_adapter(self._student.channels, channels, like)

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher, of several the first; None with ``enabled=False``."""
        return self.teachers[0] if self._teachers else None

    @property
    def teachers(self) -> list[nn.Module]:
        """All frozen teachers."""
        return [paired.adapter.model for paired in self._teachers]

    @property
    def frozen_teachers(self) -> list[FrozenTeacher]:
        """The same with what each of them teaches."""
        return self._teachers

    def describe(self) -> list[str]:
        """Who teaches which classes, in lines to read; nothing where one teacher has just the student's classes."""
        lines = [f"{paired.name} teaches {paired.classes.describe()}" for paired in self._teachers if paired.classes]
        taught = {name for paired in self._teachers for name in paired.taught}
        left = [name for name in self.student_classes or () if name not in taught]
        return [*lines, f"no teacher for {', '.join(left)}"] if lines and left else lines

    @property
    def weight(self) -> float:
        """lambda, the schedule's weight of all distillation terms at the current position."""
        return self.schedule.value

    def start(self, total_epochs: int, steps_per_epoch: int) -> None:
        """Tell the schedule how long the training is; without it lambda stays 1."""
        self.schedule.start(total_epochs, steps_per_epoch)

    def set_progress(self, epoch: int, step: int) -> None:
        """Tell the schedule where the training is; ``step`` counts inside the epoch, both from 0."""
        self.schedule.set_progress(epoch, step)

    def task_state(self) -> dict[str, Any]:
        """What a resumed distillation needs beside the student and the optimizer."""
        self.settle()
        return {"adapters": self.adapters.state_dict(), "schedule": self.schedule.state_dict()}

    def settle(self) -> None:
        """Raise now what the check of the last step has found; on a GPU the next call would raise it.

        Raises:
            FloatingPointError: a term was NaN or infinite.
        """
        self._check_finite.settle()

    def load_task_state(self, state: dict[str, Any]) -> None:
        self.adapters.load_state_dict(state["adapters"])
        self.schedule.load_state_dict(state["schedule"])

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses of one step, or the student's detections in eval mode.

        Args:
            images: N x (3, H, W) in [0, 1], sizes may differ.
            targets: N x dict with "boxes" (G, 4) xyxy pixels and "labels" (G,) int64, and what else the
                detector needs.

        Returns:
            The detector's losses under its own names, then ``distill_<term>`` for every term with weight,
            each already multiplied by its weight and lambda. Their sum is what to minimise.

        Raises:
            ValueError: the passes do not fit each other; names both sides.
            RuntimeError: a term cannot reach the student.
            FloatingPointError: a term is NaN or infinite; on a GPU it was one of the previous call.
        """
        if not self.training:
            return self.student(images)
        if not self.enabled:
            return self.student(images, targets)
        if self.weight == 0:
            self.stats = {"lambda": torch.zeros((), device=next(self.student.parameters()).device)}
            return {**self.student(images, targets), **self._ended()}
        student, passes = self._passes(images, targets)
        terms = self._terms(student, passes)
        checks.check_gradients(terms, student.features)
        weights = self.settings.weights
        return {
            **student.losses,
            **{f"distill_{name}": self.weight * weights[name] * value for name, value in terms.items()},
        }

    @torch.no_grad()
    def look(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]
    ) -> tuple[StudentPass, list[tuple[FrozenTeacher, Regions, RegionLosses]]]:
        """What the region terms make of a batch, without gradients.

        Returns the student's pass, and for each teacher the regions that it teaches, with the gates and scores of each.

        The student's pass is one of training, so that it has to be in training mode. Labels are those of the classes
        that teacher and student share: see :class:`tardkd.distill.classes.ClassMap`.
        """
        student, passes = self._passes(images, targets)
        adapters = [teacher.adapter for teacher in self._teachers]
        shared = share_regions(self._student, student, list(zip(adapters, passes)), self.settings)
        found = []
        for teacher, seen in zip(self._teachers, passes):
            regions, head = teacher.look(shared, seen)
            losses = teacher.region_losses(student, seen, regions, head, self.adapters, "mean")
            found.append((teacher, regions, losses))
        return student, found

    def _passes(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]
    ) -> tuple[StudentPass, list[TeacherPass]]:
        passes: list[TeacherPass] = []

        def start_teachers(inputs: InputBatch) -> None:
            passes.extend(teacher.start(images, inputs) for teacher in self._teachers)

        student = self._student.student_pass(images, targets, start_teachers)
        join_beside(student.inputs.tensor.device)
        return student, passes

    def _ended(self) -> dict[str, Tensor]:
        """Zeros that keep the adapters in the graph: DDP waits for a gradient of every parameter."""
        zero = next(self.student.parameters()).new_zeros(())
        for parameter in self.adapters.parameters():
            zero = zero + 0 * parameter.sum()
        return {f"distill_{name}": zero for name, weight in self.settings.weights.items() if weight}

    def _terms(self, student: StudentPass, passes: Sequence[TeacherPass]) -> dict[str, Tensor]:
        """The terms with weight, not yet weighted."""
        self.stats = {"lambda": torch.full((), self.weight, device=student.inputs.tensor.device)}
        weights = self.settings.weights
        terms: dict[str, Tensor] = {}
        # A gate closes on a NaN of the teacher's, so that the terms alone would not show it.
        suspects: dict[str, Tensor] = {}
        if any(weights[name] for name in REGION_TERMS):
            terms, suspects = self._region_terms(student, passes)
        if weights["gaussian"]:
            objects = [teacher.objects(student) for teacher in self._teachers]
            losses = [
                teacher.gaussian_loss(student, seen, boxes, self.adapters)
                for teacher, seen, boxes in zip(self._teachers, passes, objects)
            ]
            terms["gaussian"] = joint_gaussian_loss(losses, objects)
        if self.settings.check_finite:
            self._check_finite({**{f"distill_{name}": value for name, value in terms.items()}, **suspects})
        return terms

    def _region_terms(
        self, student: StudentPass, passes: Sequence[TeacherPass]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms over shared regions, and what of the teachers' must be finite beside them."""
        adapters = [teacher.adapter for teacher in self._teachers]
        shared = share_regions(self._student, student, list(zip(adapters, passes)), self.settings)
        looks = [teacher.look(shared, seen) for teacher, seen in zip(self._teachers, passes)]
        reduction = "mean" if len(looks) == 1 else "sum"
        losses = joint_region_losses(
            [
                teacher.region_losses(student, seen, *look, self.adapters, reduction)
                for teacher, seen, look in zip(self._teachers, passes, looks)
            ]
        )
        objects = [foreground(regions.labels, regions.head.logits, self._student.head) for regions, _ in looks]
        self.stats.update(region_stats(losses, objects[0] if len(objects) == 1 else torch.cat(objects)))
        suspects: dict[str, Tensor] = {}
        for teacher, (_, head) in zip(self._teachers, looks):
            suspects |= {f"{teacher.name}'s logits": head.logits, f"{teacher.name}'s deltas": head.deltas}
        terms = {name: getattr(losses, name) for name in REGION_TERMS if self.settings.weights[name]}
        share = share_of_all(losses.gates)
        if share is not None:
            terms = {name: value * share[REGION_TERMS.index(name)] for name, value in terms.items()}
        return terms, suspects
