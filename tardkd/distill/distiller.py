"""A student that trains with a teacher's help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tardkd.detectors import Detector, find, for_model
from tardkd.detectors.base import Batch, InputBatch, Regions, StudentPass, TeacherPass
from tardkd.device import join_beside
from tardkd.ops import RegionLosses
from tardkd.ops.spec import Reduction

from . import checks
from .balance import Balance, BalanceWatch
from .findings import Findings
from .inputs import InputCheck
from .means import joint_gaussian_loss, joint_mean, joint_region_losses, share_of_all
from .pairing import ClassesArgument, ClassMapArgument, TeacherArgument, as_teachers, pair_teachers
from .schedule import Schedule
from .settings import DistillSettings
from .sharing import region_stats, share_regions
from .tapping import tapped_maps
from .teachers import FrozenTeacher, Lesson

REGION_TERMS = ("feature", "classification", "regression", "distribution")
GATES = dict(zip(REGION_TERMS, (0, 1, 2, 2)))  # the column of the gate of each term: a box teaches as a whole


class Distiller(nn.Module):
    """Student and channel adapters as one trainable module, beside a frozen teacher.

    >>> distiller = Distiller(student, teacher, DistillSettings())
    >>> losses = distiller(images, targets)
    >>> sum(losses.values()).backward()

    The teacher is a plain attribute: it is in eval mode, frozen in place, and in no ``state_dict()``, ``parameters()``
    or ``modules()``; it follows the student's device by itself. So optimizers, DDP and checkpoints see the student
    (``student.*``) and the adapters (``adapters.*``) only. Every parameter gets a gradient in every step, also when the
    schedule has ended, as DDP wants it.

    Label sets may differ: classes of the same name are matched, a class map pairs others, and only these are
    transferred (see :class:`tardkd.distill.classes.ClassMap`). Several teachers each teach classes of their own:

    >>> pets = Teacher(pet_detector, classes=["cat", "hound"], class_map={"hound": "dog"})
    >>> cattle = Teacher(cattle_detector, classes=["cow"])
    >>> distiller = Distiller(student, [pets, cattle], student_classes=["cat", "dog", "cow"])

    A region is then compared with the teacher of its class alone, a background region, where a gate lets it through,
    with every teacher; each term is the mean over the open gates of all teachers (``gaussian``: over all objects).

    Args:
        student: a detector of a family that :mod:`tardkd.detectors` knows, or one of your own in a
            :class:`tardkd.detectors.Detector`. The distiller is called as it is called, and returns what it returns.
        teacher: another one, plain or as a :class:`Teacher` that says which classes it has, or a list of these.
            Channels, levels, strides, input size and normalisation may differ. May be None with ``enabled=False``.
        settings: weights, gates, losses, schedule; for all teachers.
        enabled: False makes this exactly the student: same losses, same random numbers, no teacher, no
            adapters.
        student_classes: class names in the order of the labels, without the background.
        teacher_classes: the same of a teacher that is given as a plain model, for a list of models a list of such
            lists. Without names of both sides the classes must be the same, in the same order.
        class_map: for a teacher that is given as a plain model: its class name to the student's, or to None, which is
            not transferred. The map comes before equal names. For a list of models it is a list, None where there is
            nothing to map.

    Raises:
        TypeError: a model of an unknown family, or something that is no model.
        ValueError: the models cannot be paired; names both sides.
    """

    def __init__(
        self,
        student: nn.Module | Detector,
        teacher: TeacherArgument,
        settings: DistillSettings | None = None,
        *,
        enabled: bool = True,
        student_classes: Sequence[str] | None = None,
        teacher_classes: ClassesArgument = None,
        class_map: ClassMapArgument = None,
    ) -> None:
        super().__init__()
        if not isinstance(student, (nn.Module, Detector)):
            raise TypeError(f"the student must be a detector (an nn.Module), got {type(student).__name__}")
        if settings is not None and not isinstance(settings, DistillSettings):
            raise TypeError(f"settings must be a DistillSettings, got {type(settings).__name__}")
        self.settings = settings if settings is not None else DistillSettings()
        self.enabled = enabled
        self.schedule = Schedule(self.settings.schedule)
        self.stats: dict[str, Tensor] = {}  # scalars () of the last step: lambda, what the gates let through, and why
        self.student = student.model if isinstance(student, Detector) else student
        self.student_classes = student_classes
        self.adapters = nn.ModuleDict()
        self._teachers: list[FrozenTeacher] = []
        self._check_finite = checks.FiniteCheck()
        self._check_inputs = InputCheck()
        self._balance = Balance()
        self._watch_balance = BalanceWatch()
        if not enabled:
            self._student = find(student)
            return
        teachers = as_teachers(teacher, teacher_classes, class_map)
        if not teachers:
            raise ValueError("a Distiller with enabled=True needs a teacher")
        self._student = for_model(student)
        self._teachers = pair_teachers(self.detector, teachers, self.settings, student_classes)
        for paired in self._teachers:
            self.adapters[paired.adapter_key] = paired.make_adapter()

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher, of several the first; None with ``enabled=False``."""
        return self.teachers[0] if self._teachers else None

    @property
    def teachers(self) -> list[nn.Module]:
        """All frozen teachers."""
        return [paired.model for paired in self._teachers]

    @property
    def detector(self) -> Detector:
        """The student in the terms of its family; with ``enabled=False`` it need not have one.

        Raises:
            TypeError: it has none.
        """
        return self._student or for_model(self.student)

    @property
    def frozen_teachers(self) -> list[FrozenTeacher]:
        """The same teachers, each with the classes that it teaches."""
        return self._teachers

    def describe(self) -> list[str]:
        """Who teaches which classes, in lines to read; nothing where one teacher has just the student's classes."""
        maps = [(paired.name, paired.classes) for paired in self._teachers]
        lines = [f"{name} teaches {classes.describe()}" for name, classes in maps if not classes.is_identity]
        taught = {name for _, classes in maps for name in classes.taught}
        untaught = [name for name in self.student_classes or () if name not in taught]
        return [*lines, f"no teacher for {', '.join(untaught)}"] if lines and untaught else lines

    @property
    def weight(self) -> float:
        """Lambda, the schedule's weight of all distillation terms at the current position."""
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
        return {
            "adapters": self.adapters.state_dict(),
            "schedule": self.schedule.state_dict(),
            "balance": self._balance.state_dict(),
        }

    def settle(self) -> None:
        """Raise now what the checks of the last step have found; on a GPU the next call would raise it.

        Raises:
            FloatingPointError: a loss of the detector or a term was NaN or infinite.
            ValueError: a target cannot be right.
        """
        for check in (self._check_inputs, self._check_finite, self._watch_balance):
            check.settle()

    def load_task_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`task_state` returned."""
        self.adapters.load_state_dict(state["adapters"])
        self.schedule.load_state_dict(state["schedule"])
        if "balance" in state:  # a state that was saved before terms were balanced has none
            self._balance.load_state_dict(state["balance"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One step, called as the student is called: losses in training, the student's detections in eval mode.

        Args:
            args, kwargs: those of the student's own call. Of torchvision's detectors: ``images``, N x (3, H, W) in
                [0, 1], sizes may differ; ``targets``, N dicts with "boxes" (G, 4) xyxy in pixels, "labels" (G,) int64,
                and what else the detector needs, required in training mode. Of transformers': ``pixel_values``,
                ``labels`` and so on.

        Returns:
            What the student's own call returns. Of torchvision's detectors, scalars (): the detector's losses under
            its own names, then ``distill_<term>`` for every term with weight, each already multiplied by its weight
            and lambda; their sum is what to minimise. Where the output has one loss, as transformers' has, that sum
            is the loss. In eval mode, what the student itself returns.

        Raises:
            TypeError: images are integers.
            ValueError: the passes do not fit each other; names both sides. Or a box or label cannot be right; names
                the image.
            RuntimeError: a term cannot reach the student.
            FloatingPointError: a loss of the detector or a term is NaN or infinite; on a GPU it was one of the
                previous call.

        Warns:
            UserWarning: once each, where images are not in the range that the student normalises, where a term's
                gradient at the student's features dwarfs that of the detector's own losses, and where the schedule is
                not told of the training's progress.
        """
        if not self.training or self._student is None:
            return self.student(*args, **kwargs)
        batch = self._student.read_call(*args, **kwargs)
        if not self.enabled:
            return self._student.as_called(batch, *self._student.call(batch))
        self.schedule.count_step()
        self._check_inputs.before(batch.images, batch.targets, self._student.head)
        if self.weight == 0:
            output, losses = self._student.call(batch)
            self.stats = {"lambda": torch.zeros((), device=next(self.student.parameters()).device)}
            if self.settings.check_finite:
                self._check_finite(losses)
            return self._student.as_called(batch, output, {**losses, **self._ended()})
        student_pass, losses = self.step(batch)
        self._check_inputs.after(batch.images, student_pass.inputs)
        self._watch_balance(losses, student_pass.features, self.settings.weights)
        return self._student.as_called(batch, student_pass.output, losses)

    def step(self, batch: Batch) -> tuple[StudentPass, dict[str, Tensor]]:
        """What :meth:`forward` does in a step with a teacher, but for its checks of what it is given.

        Args:
            batch: what the student's family has read of its call.

        Returns:
            The student's pass and the losses, scalars ().
        """
        student_pass, teacher_passes = self._run_models(batch)
        terms = self._terms(student_pass, teacher_passes)
        checks.check_gradients(terms, student_pass.features)
        factors = self._factors(terms, student_pass)
        weighted = {f"distill_{name}": self.weight * factors[name] * value for name, value in terms.items()}
        return student_pass, {**student_pass.losses, **weighted}

    def _factors(self, terms: Mapping[str, Tensor], student_pass: StudentPass) -> dict[str, Tensor | float]:
        """What each term is multiplied by, beside lambda."""
        weights = {name: self.settings.weights[name] for name in terms}
        if self.settings.balance == "none":
            return dict(weights)
        named = {f"distill_{name}": value for name, value in terms.items()}
        return self._balance(weights, {**student_pass.losses, **named}, student_pass.features, self.detector.heads)

    def check(self, *args: Any, **kwargs: Any) -> Findings:
        """Look at one batch as a training would, before it begins; nothing is changed.

        >>> print(distiller.check(images, targets))

        It takes about the time of two steps and says which classes are paired, how the features are compared, whether
        the batch and all losses are sound, what the gates open, how strongly each term pulls against the detector's
        own losses, and which trained tensors no gradient reaches. ``tardkd doctor`` looks at more, of a recipe.

        Args:
            args, kwargs: as in :meth:`forward`.

        Returns:
            A list of findings, each with its level, "ok", "warning" or "problem", a text, an advice and the numbers
            behind them. Printed, it is a line of each.
        """
        from .examination import examine

        return examine(self, self.detector.read_call(*args, **kwargs))

    @torch.no_grad()
    def look(self, *args: Any, **kwargs: Any) -> tuple[StudentPass, list[tuple[FrozenTeacher, Regions, RegionLosses]]]:
        """What the region terms make of a batch, without gradients.

        The student's pass is one of training, so that it has to be in training mode.

        Args:
            args, kwargs: as in :meth:`forward`.

        Returns:
            The student's pass, and for each teacher the regions that it teaches, with the gates and scores of each.
            Their labels are those of the classes that teacher and student share: see
            :class:`tardkd.distill.classes.ClassMap`.
        """
        student_pass, teacher_passes = self._run_models(self.detector.read_call(*args, **kwargs))
        lessons = self._prepare_lessons(student_pass, teacher_passes)
        losses = self._region_losses(student_pass, teacher_passes, lessons, "mean")
        return student_pass, [
            (teacher, lesson.regions, of_teacher)
            for teacher, lesson, of_teacher in zip(self._teachers, lessons, losses)
        ]

    def _run_models(self, batch: Batch) -> tuple[StudentPass, list[TeacherPass]]:
        """The student's pass and one of each teacher; a GPU runs them beside each other."""
        teacher_passes: list[TeacherPass] = []

        def start_teachers(inputs: InputBatch) -> None:
            teacher_passes.extend(teacher.start(batch.images, inputs) for teacher in self._teachers)

        count = sum(teacher.reads_pyramid for teacher in self._teachers)
        with tapped_maps(self.detector.pyramid, count) as taps:
            student_pass = self.detector.student_pass(batch, start_teachers)
        for tap in taps:  # one at most
            student_pass.tap = tap
            student_pass.features = [tap.original(level) for level in student_pass.features]
        join_beside(student_pass.inputs.tensor.device)
        return student_pass, teacher_passes

    def _ended(self) -> dict[str, Tensor]:
        """Zeros that keep the adapters in the graph: DDP waits for a gradient of every parameter."""
        zero = next(self.student.parameters()).new_zeros(())
        for parameter in self.adapters.parameters():
            zero = zero + 0 * parameter.sum()
        return {f"distill_{name}": zero for name, weight in self.settings.weights.items() if weight}

    def _terms(self, student_pass: StudentPass, teacher_passes: Sequence[TeacherPass]) -> dict[str, Tensor]:
        """The terms with weight, not yet weighted."""
        self.stats = {"lambda": torch.full((), self.weight, device=student_pass.inputs.tensor.device)}
        weights = self.settings.weights
        terms: dict[str, Tensor] = {}
        # A gate closes on a NaN of the teacher's, so that the terms alone would not show it.
        suspects: dict[str, Tensor] = {}
        if any(weights[name] for name in REGION_TERMS):
            lessons = self._prepare_lessons(student_pass, teacher_passes)
            terms = self._region_terms(student_pass, teacher_passes, lessons)
            for teacher, lesson in zip(self._teachers, lessons):
                suspects[f"{teacher.name}'s logits"] = lesson.head.logits
                suspects[f"{teacher.name}'s {teacher.box_coding}"] = lesson.head.boxes
        if weights["gaussian"]:
            terms["gaussian"] = self._gaussian_term(student_pass, teacher_passes)
        if self.settings.check_finite:
            named = {f"distill_{name}": value for name, value in terms.items()}
            self._check_finite({**student_pass.losses, **named, **suspects})
        return terms

    def _prepare_lessons(self, student_pass: StudentPass, teacher_passes: Sequence[TeacherPass]) -> list[Lesson]:
        """For each teacher the shared regions that it teaches."""
        detectors = [teacher.detector for teacher in self._teachers]
        shared = share_regions(self.detector, student_pass, list(zip(detectors, teacher_passes)), self.settings)
        return [
            teacher.prepare_lesson(shared, teacher_pass)
            for teacher, teacher_pass in zip(self._teachers, teacher_passes)
        ]

    def _region_losses(
        self,
        student_pass: StudentPass,
        teacher_passes: Sequence[TeacherPass],
        lessons: Sequence[Lesson],
        reduction: Reduction,
    ) -> list[RegionLosses]:
        """For each teacher the losses over the regions that it teaches."""
        return [
            teacher.region_losses(student_pass, teacher_pass, lesson, self.adapters[teacher.adapter_key], reduction)
            for teacher, teacher_pass, lesson in zip(self._teachers, teacher_passes, lessons)
        ]

    def _region_terms(
        self, student_pass: StudentPass, teacher_passes: Sequence[TeacherPass], lessons: Sequence[Lesson]
    ) -> dict[str, Tensor]:
        """The terms over shared regions that have weight, each a mean over the open gates of all teachers."""
        reduction: Reduction = "mean" if len(lessons) == 1 else "sum"
        by_teacher = self._region_losses(student_pass, teacher_passes, lessons, reduction)
        losses = joint_region_losses(by_teacher)
        foregrounds = [lesson.regions.foreground(self.detector.head) for lesson in lessons]
        self.stats.update(region_stats(losses, foregrounds[0] if len(foregrounds) == 1 else torch.cat(foregrounds)))
        terms = {
            name: getattr(losses, name)
            for name in REGION_TERMS
            if name != "distribution" and self.settings.weights[name]
        }
        if self.settings.distribution:
            parts = [
                teacher.distribution_loss(lesson, of_teacher.gates[:, GATES["distribution"]], reduction)
                for teacher, lesson, of_teacher in zip(self._teachers, lessons, by_teacher)
            ]
            terms["distribution"] = joint_mean(parts, losses.gates[:, GATES["distribution"]])
        share = share_of_all(losses.gates)
        if share is not None:
            terms = {name: value * share[GATES[name]] for name, value in terms.items()}
        return terms

    def _gaussian_term(self, student_pass: StudentPass, teacher_passes: Sequence[TeacherPass]) -> Tensor:
        """The term over whole feature maps, a mean over the objects of all teachers."""
        objects = [teacher.objects(student_pass) for teacher in self._teachers]
        losses = [
            teacher.gaussian_loss(student_pass, teacher_pass, boxes, self.adapters[teacher.adapter_key])
            for teacher, teacher_pass, boxes in zip(self._teachers, teacher_passes, objects)
        ]
        return joint_gaussian_loss(losses, objects)
