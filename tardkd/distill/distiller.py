"""A student that trains with a teacher's help."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, astuple
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from tardkd import ops
from tardkd.detectors import DetectorAdapter, for_model
from tardkd.detectors.base import HeadOutputs, InputBatch, Regions, RoISettings, StudentPass, TeacherPass

from . import checks
from .adapters import make_adapters
from .device import join_beside, run_beside
from .normalise import share_of_all
from .schedule import Schedule
from .settings import DistillSettings
from .sharing import foreground, region_stats, rescale_deltas, share_regions

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

    Args:
        student: a detector of a family that :mod:`tardkd.detectors` knows.
        teacher: another one, of the same classes. Its channels, levels, strides, input size and normalisation
            may differ. May be None with ``enabled=False``.
        settings: weights, gates, losses, schedule.
        enabled: False makes this exactly the student: same losses, same random numbers, no teacher, no
            adapters.
        student_classes, teacher_classes: class names in the order of the labels; compared where both are
            given.

    Raises:
        TypeError: a model of an unknown family.
        ValueError: the two models cannot be paired; names both sides.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        settings: DistillSettings | None = None,
        *,
        enabled: bool = True,
        student_classes: Sequence[str] | None = None,
        teacher_classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings if settings is not None else DistillSettings()
        self.enabled = enabled
        self.schedule = Schedule(self.settings.schedule)
        self.stats: dict[str, Tensor] = {}
        self.student = student
        self.adapters = nn.ModuleDict()
        self._teacher: DetectorAdapter | None = None
        self._check_finite = checks.FiniteCheck()
        if enabled:
            if teacher is None:
                raise ValueError("a Distiller with enabled=True needs a teacher")
            checks.check_class_names(student_classes, teacher_classes)
            self._pair(for_model(student), for_model(teacher))

    def _pair(self, student: DetectorAdapter, teacher: DetectorAdapter) -> None:
        checks.check_separate(student.model, teacher.model)
        checks.check_head_widths(student.head.widths, teacher.head.widths)
        self._student, self._teacher = student, teacher
        teacher.model.eval().requires_grad_(False)
        self._ratio = self.settings.teacher_input_ratio or teacher.input_size / student.input_size
        self._pooled = self._choose_path(student.roi, teacher.roi)
        if self.settings.feature or self.settings.gaussian:
            like = next(student.model.parameters())
            self.adapters = make_adapters(student.channels, teacher.channels, like)

    def _choose_path(self, student: RoISettings, teacher: RoISettings) -> bool:
        """Whether the feature term reads what the two box heads pooled: possible if they pool alike."""
        alike = astuple(student)[:3] == astuple(teacher)[:3]
        if self.settings.path == "pooled" and not alike:
            raise ValueError(
                "path='pooled' needs equal output_size, sampling_ratio and aligned; "
                f"student: {student}, teacher: {teacher}"
            )
        return alike and self.settings.path != "pyramid"

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher; None with ``enabled=False``."""
        return None if self._teacher is None else self._teacher.model

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
        teachers: list[TeacherPass] = []

        def start_teacher(inputs: InputBatch) -> None:
            teachers.append(self._start_teacher(images, inputs))

        student = self._student.student_pass(images, targets, start_teacher)
        join_beside(student.inputs.tensor.device)
        terms = self._terms(student, teachers[0])
        checks.check_gradients(terms, student.features)
        weights = self.settings.weights
        return {
            **student.losses,
            **{f"distill_{name}": self.weight * weights[name] * value for name, value in terms.items()},
        }

    def _ended(self) -> dict[str, Tensor]:
        """Zeros that keep the adapters in the graph: DDP waits for a gradient of every parameter."""
        zero = next(self.student.parameters()).new_zeros(())
        for parameter in self.adapters.parameters():
            zero = zero + 0 * parameter.sum()
        return {f"distill_{name}": zero for name, weight in self.settings.weights.items() if weight}

    def _start_teacher(self, images: Sequence[Tensor], inputs: InputBatch) -> TeacherPass:
        """The teacher's trunk, which needs the batch alone: on a GPU it runs beside the student's."""
        device = inputs.tensor.device
        with torch.no_grad():
            self._ready_teacher(device)
            with torch.autocast(device.type, torch.bfloat16) if self.settings.teacher_bf16 else nullcontext():
                return run_beside(device, lambda: self._teacher.teacher_pass(images, inputs, self._ratio))

    def _terms(self, student: StudentPass, teacher: TeacherPass) -> dict[str, Tensor]:
        """The terms with weight, not yet weighted."""
        self.stats = {"lambda": torch.full((), self.weight, device=student.inputs.tensor.device)}
        weights = self.settings.weights
        terms: dict[str, Tensor] = {}
        # A gate closes on a NaN of the teacher's, so that the terms alone would not show it.
        suspects: dict[str, Tensor] = {}
        if any(weights[name] for name in REGION_TERMS):
            regions, head = share_regions(self._student, self._teacher, student, teacher, self.settings)
            losses = self._region_losses(student, teacher, regions, head)
            share = share_of_all(losses.gates)
            for i, name in enumerate(REGION_TERMS):
                if weights[name]:
                    terms[name] = getattr(losses, name) if share is None else getattr(losses, name) * share[i]
            suspects = {"the teacher's logits": head.logits, "the teacher's deltas": head.deltas}
        if weights["gaussian"]:
            terms["gaussian"] = self._gaussian_loss(student, teacher)
        if self.settings.check_finite:
            self._check_finite({**{f"distill_{name}": value for name, value in terms.items()}, **suspects})
        return terms

    def _ready_teacher(self, device: torch.device) -> None:
        """Undo what may have happened to the teacher since the last step."""
        model = self._teacher.model
        if model.training:
            model.eval()
        if next(model.parameters()).device != device:
            model.to(device)

    def _region_losses(
        self, student: StudentPass, teacher: TeacherPass, regions: Regions, head: HeadOutputs
    ) -> ops.RegionLosses:
        settings, convention = self.settings, self._student.head
        checks.check_head_widths(regions.head.widths, head.widths)
        common = (
            regions.proposals,
            regions.head.logits,
            head.logits,
            regions.head.deltas,
            rescale_deltas(head.deltas, self._teacher.head.box_weights, convention.box_weights),
            regions.labels,
            regions.gt_boxes,
        )
        options = {
            "feature_loss": settings.feature_loss,
            "bin_weight": settings.bin_weight,
            "feature_gate": settings.feature_gate,
            "classification_gate": settings.classification_gate,
            "regression_gate": settings.regression_gate,
            "temperature": settings.temperature,
            "beta": settings.beta,
            "box_weights": convention.box_weights,
            "background": convention.background,
            "activation": convention.activation,
        }
        if not settings.feature:
            # The op wants features; one zero a region stands for them where only the heads transfer.
            nothing = regions.head.logits.new_zeros((len(regions.labels), 1, 1, 1))
            losses = ops.pooled_distill_loss(nothing, nothing, *common, **options)
        elif self._pooled:
            adapted = self.adapters["feature"](regions.head.pooled)
            losses = ops.pooled_distill_loss(adapted, head.pooled, *common, **options)
        else:
            losses = ops.region_distill_loss(
                [self.adapters["feature"](level) for level in student.features],
                teacher.features,
                *common,
                student_scales=student.scales,
                teacher_scales=teacher.scales,
                **asdict(self._student.roi),
                **options,
            )
        self.stats.update(region_stats(losses, foreground(regions.labels, regions.head.logits, convention)))
        return losses

    def _gaussian_loss(self, student: StudentPass, teacher: TeacherPass) -> Tensor:
        if student.scales != teacher.scales:
            raise ValueError(
                "the gaussian term compares maps position by position and needs equal scales; student: "
                f"{student.scales}, teacher: {teacher.scales}"
            )
        return ops.gaussian_feature_loss(
            [self.adapters["feature"](level) for level in student.features],
            teacher.features,
            [target["boxes"] for target in student.targets],
            scales=student.scales,
            sigma_squared=self.settings.sigma_squared,
        )
