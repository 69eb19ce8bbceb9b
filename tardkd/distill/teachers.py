"""One teacher beside the student: what of it runs in a step, and what it teaches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, astuple

import torch
from torch import Tensor, nn

from tardkd import ops
from tardkd.detectors import DetectorAdapter, for_model
from tardkd.detectors.base import HeadOutputs, InputBatch, Regions, StudentPass, TeacherPass
from tardkd.device import run_beside

from . import checks
from .classes import ClassMap, match_classes
from .settings import DistillSettings
from .sharing import rescale_deltas

Names = Sequence[str]
Renamed = Mapping[str, "str | None"]


def pair_teachers(
    student: DetectorAdapter,
    teacher: nn.Module | Sequence[nn.Module],
    settings: DistillSettings,
    student_classes: Names | None,
    teacher_classes: Names | Sequence[Names] | None,
    class_map: Renamed | Sequence[Renamed | None] | None,
) -> list[FrozenTeacher]:
    """Every teacher with its share of the student's classes; of several, the arguments are lists.

    Raises:
        ValueError: a teacher cannot be paired with the student, or two teach the same class; says which.
    """
    if isinstance(teacher, nn.Module):
        teacher, teacher_classes, class_map = [teacher], [teacher_classes], [class_map]
    count = len(teacher)
    teacher_classes, class_map = teacher_classes or [None] * count, class_map or [None] * count
    if not len(teacher_classes) == len(class_map) == count:
        raise ValueError(
            f"{count} teachers need as many teacher_classes and class_maps, got {len(teacher_classes)} and "
            f"{len(class_map)}"
        )
    if count > 1 and (student_classes is None or None in teacher_classes):
        raise ValueError("several teachers share the student's classes: student_classes and all teacher_classes needed")
    teachers = []
    for number, (model, names, renamed) in enumerate(zip(teacher, teacher_classes, class_map)):
        place = None if count == 1 else number
        try:
            teachers.append(FrozenTeacher(model, student, settings, _match(student_classes, names, renamed), place))
        except ValueError as error:
            if place is None:
                raise
            raise ValueError(f"teacher {place}: {error}") from error
    if count > 1:
        _check_disjoint(teachers)
    return teachers


def _match(student: Names | None, teacher: Names | None, renamed: Renamed | None) -> ClassMap | None:
    if student is not None and teacher is not None:
        return match_classes(student, teacher, renamed)
    if renamed:
        raise ValueError("a class map needs the names of both sides: student_classes and teacher_classes")
    return None


def _check_disjoint(teachers: Sequence[FrozenTeacher]) -> None:
    taught_by: dict[str, list[str]] = {}
    for teacher in teachers:
        for name in teacher.taught:
            taught_by.setdefault(name, []).append(teacher.name)
    clashes = [f"{name} ({' and '.join(by)})" for name, by in taught_by.items() if len(by) > 1]
    if clashes:
        raise ValueError(
            f"every class has one teacher at most, but several teach {', '.join(clashes)}; "
            "map such a class to null in all but one class map"
        )


class FrozenTeacher:
    """A model that is frozen in place and kept in eval mode; no part of the module that trains.

    Args:
        model: the teacher.
        student: what it is paired with.
        settings: of the distillation.
        classes: its classes and the student's; None: the same ones, without names.
        number: its place among several teachers; None for the only one.

    Raises:
        TypeError: a model of an unknown family.
        ValueError: the two models cannot be paired; names both sides.
    """

    def __init__(
        self,
        model: nn.Module,
        student: DetectorAdapter,
        settings: DistillSettings,
        classes: ClassMap | None,
        number: int | None = None,
    ) -> None:
        self.adapter, self.student, self.settings = for_model(model), student, settings
        self.name = "the teacher" if number is None else f"teacher {number}"
        self.adapter_key = "feature" if number is None else f"feature_{number}"  # in the distiller's adapters
        self.taught = [] if classes is None else classes.taught  # the student's names
        ours, theirs = student.head, self.adapter.head
        checks.check_separate(student.model, model)
        checks.check_conventions(ours, theirs, named=classes is not None)
        same = classes is None or (classes.is_identity and ours.background == theirs.background)
        self.classes = None if same else classes
        if same:
            checks.check_head_widths(ours.widths, theirs.widths)
        else:
            classes.check_widths(ours, theirs)
        model.eval().requires_grad_(False)
        self.seconds = 0.0  # of the host's time that it has taken so far: on a CPU all of its time
        self.ratio = settings.teacher_input_ratio or self.adapter.input_size / student.input_size
        self.pooled = self._choose_path()

    @property
    def model(self) -> nn.Module:
        """The frozen model itself."""
        return self.adapter.model

    def _choose_path(self) -> bool:
        """Whether the feature term reads what the two box heads pooled: possible if they pool alike."""
        student, teacher = self.student.roi, self.adapter.roi
        alike = astuple(student)[:3] == astuple(teacher)[:3]
        if self.settings.path == "pooled" and not alike:
            raise ValueError(
                "path='pooled' needs equal output_size, sampling_ratio and aligned; "
                f"student: {student}, teacher: {teacher}"
            )
        return alike and self.settings.path != "pyramid"

    # --- what runs

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def ready(self, device: torch.device) -> None:
        """Undo what may have happened to the teacher since the last step."""
        model = self.adapter.model
        if model.training:
            model.eval()
        if next(model.parameters()).device != device:
            model.to(device)

    def start(self, images: Sequence[Tensor], inputs: InputBatch) -> TeacherPass:
        """The trunk, which needs the batch alone: on a GPU it runs beside the student's."""
        device = inputs.tensor.device
        with torch.no_grad(), self._timed():
            self.ready(device)
            with torch.autocast(device.type, torch.bfloat16) if self.settings.teacher_bf16 else nullcontext():
                return run_beside(device, lambda: self.adapter.teacher_pass(images, inputs, self.ratio))

    def look(self, shared: Regions, seen: TeacherPass) -> tuple[Regions, HeadOutputs]:
        """The regions that it teaches and what its head says of them, both of its classes alone."""
        regions = shared if self.classes is None else self.classes.student_regions(shared, self.student.head)
        with torch.no_grad(), self._timed():
            head = self.adapter.teacher_head(seen, regions.proposals)
            if self.classes is not None:
                head = self.classes.teacher_outputs(head, self.adapter.head, self.student.head.background)
        checks.check_head_widths(regions.head.widths, head.widths)
        return regions, head

    # --- what it teaches

    def region_losses(
        self,
        student: StudentPass,
        seen: TeacherPass,
        regions: Regions,
        head: HeadOutputs,
        adapters: nn.ModuleDict,
        reduction: str,
    ) -> ops.RegionLosses:
        """``regions``, ``head``: from :meth:`look`; ``reduction``: "mean" or "sum" over the open gates."""
        settings, convention = self.settings, self.student.head
        common = (
            regions.proposals,
            regions.head.logits,
            head.logits,
            regions.head.deltas,
            rescale_deltas(head.deltas, self.adapter.head.box_weights, convention.box_weights),
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
            "reduction": reduction,
        }
        if not settings.feature:
            # The op wants features; one zero a region stands for them where only the heads transfer.
            nothing = regions.head.logits.new_zeros((len(regions.labels), 1, 1, 1))
            return ops.pooled_distill_loss(nothing, nothing, *common, **options)
        if self.pooled:
            adapted = adapters[self.adapter_key](regions.head.pooled)
            return ops.pooled_distill_loss(adapted, head.pooled, *common, **options)
        return ops.region_distill_loss(
            [adapters[self.adapter_key](level) for level in student.features],
            seen.features,
            *common,
            student_scales=student.scales,
            teacher_scales=seen.scales,
            **asdict(self.student.roi),
            **options,
        )

    def gaussian_loss(
        self, student: StudentPass, seen: TeacherPass, boxes: Sequence[Tensor], adapters: nn.ModuleDict
    ) -> Tensor:
        """``boxes``: of :meth:`objects`."""
        if student.scales != seen.scales:
            raise ValueError(
                "the gaussian term compares maps position by position and needs equal scales; student: "
                f"{student.scales}, {self.name.removeprefix('the ')}: {seen.scales}"
            )
        return ops.gaussian_feature_loss(
            [adapters[self.adapter_key](level) for level in student.features],
            seen.features,
            boxes,
            scales=student.scales,
            sigma_squared=self.settings.sigma_squared,
        )

    def objects(self, student: StudentPass) -> list[Tensor]:
        """Ground truth N x (G, 4); boxes of classes it does not teach are made empty: no mask has them."""
        boxes = [target["boxes"] for target in student.targets]
        if self.classes is None or not self.classes.is_partial:
            return boxes
        labels = [self.classes.labels(target["labels"], self.student.head.background) for target in student.targets]
        return [torch.where(label[:, None] >= 0, box, 0) for box, label in zip(boxes, labels)]


# --- several teachers in one term -------------------------------------------------------------------------------------


def joint_region_losses(parts: Sequence[ops.RegionLosses]) -> ops.RegionLosses:
    """Sums over the regions of several teachers as one mean over the open gates of all; of one, what it is."""
    if len(parts) == 1:
        return parts[0]
    gates, scores = (torch.cat([getattr(part, name) for part in parts]) for name in ("gates", "scores"))
    counts = gates.sum(0).clamp(min=1)
    terms = [torch.stack(sums).sum() / count for sums, count in zip(zip(*(part[:3] for part in parts)), counts)]
    return ops.RegionLosses(*terms, gates, scores)


def joint_gaussian_loss(losses: Sequence[Tensor], objects: Sequence[Sequence[Tensor]]) -> Tensor:
    """The mean of the teachers' losses by their numbers of objects; of one, what it is.

    Args:
        objects: for each teacher its boxes, as :meth:`FrozenTeacher.objects` has them.
    """
    if len(losses) == 1:
        return losses[0]
    boxes = [torch.cat(list(own)) for own in objects]
    counts = torch.stack([(own[:, 2:] > own[:, :2]).all(1).sum() for own in boxes])
    return (torch.stack(list(losses)) * counts).sum() / counts.sum().clamp(min=1)
