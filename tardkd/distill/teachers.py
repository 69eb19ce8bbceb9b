"""One teacher beside the student: what of it runs in a step, and what it teaches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tardkd import ops
from tardkd.detectors import Detector, for_model
from tardkd.detectors.base import HeadOutputs, InputBatch, Regions, StudentPass, TeacherPass
from tardkd.device import run_beside
from tardkd.ops.spec import Reduction

from . import checks
from .classes import ClassMap
from .settings import DistillSettings
from .sharing import rescale_deltas


@dataclass(frozen=True)
class Lesson:
    """The R regions that a teacher teaches in a step, and what it says about them."""

    regions: Regions  # with the student's outputs; labels and columns are those of the classes that it teaches
    head: HeadOutputs  # the teacher's outputs on the same regions, in the same columns


class FrozenTeacher:
    """A model that is frozen in place and kept in eval mode; no part of the module that trains.

    Args:
        model: the teacher.
        student: what it is paired with.
        settings: of the distillation.
        classes: its classes and the student's.
        name: what messages call it.
        adapter_key: the name of its adapter among the distiller's.

    Raises:
        TypeError: a model of an unknown family.
        ValueError: the two models cannot be paired; names both sides.
    """

    def __init__(
        self,
        model: nn.Module,
        student: Detector,
        settings: DistillSettings,
        classes: ClassMap,
        name: str = "the teacher",
        adapter_key: str = "feature",
    ) -> None:
        self.detector, self.student, self.settings = for_model(model), student, settings
        self.classes, self.name, self.adapter_key = classes, name, adapter_key
        checks.check_separate(student.model, model)
        checks.check_conventions(student.head, self.detector.head, named=classes.is_named)
        classes.check_widths(student.head, self.detector.head)
        model.eval().requires_grad_(False)
        self.seconds = 0.0  # of the host's time that it has taken so far: on a CPU all of its time
        self.ratio = settings.teacher_input_ratio or self.detector.input_size / student.input_size
        self.reads_pooled = self._choose_path()

    @property
    def model(self) -> nn.Module:
        """The frozen model itself."""
        return self.detector.model

    def _choose_path(self) -> bool:
        """Whether the feature term reads what the two box heads have pooled: possible if they pool alike."""
        student, teacher = self.student.roi, self.detector.roi
        alike = all(
            getattr(student, name) == getattr(teacher, name) for name in ("output_size", "sampling_ratio", "aligned")
        )
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
        if self.model.training:
            self.model.eval()
        if next(self.model.parameters()).device != device:
            self.model.to(device)

    def start(self, images: Sequence[Tensor], inputs: InputBatch) -> TeacherPass:
        """Run the trunk, which needs the batch alone, on a GPU beside the student's.

        Args:
            images: N x (3, H, W) in [0, 1].
            inputs: the same as the student's backbone is going to see them.
        """
        device = inputs.tensor.device
        with torch.no_grad(), self._timed():
            self.ready(device)
            with torch.autocast(device.type, torch.bfloat16) if self.settings.teacher_bf16 else nullcontext():
                return run_beside(device, lambda: self.detector.teacher_pass(images, inputs, self.ratio))

    def prepare_lesson(self, shared: Regions, teacher_pass: TeacherPass) -> Lesson:
        """Run the head on those of the shared regions that it teaches."""
        convention = self.student.head
        regions = self.classes.student_regions(shared, convention)
        with torch.no_grad(), self._timed():
            head = self.detector.teacher_head(teacher_pass, regions.proposals)
            head = self.classes.teacher_outputs(head, self.detector.head, convention.background)
        checks.check_head_widths(regions.head.widths, head.widths)
        return Lesson(regions, head)

    # --- what it teaches

    def region_losses(
        self,
        student_pass: StudentPass,
        teacher_pass: TeacherPass,
        lesson: Lesson,
        adapter: nn.Module,
        reduction: Reduction,
    ) -> ops.RegionLosses:
        """The three terms over the regions of ``lesson``, with their gates and scores.

        Args:
            adapter: brings features from the student's channels to the teacher's.
            reduction: "mean" or "sum" over the open gates.
        """
        regions, head, convention = lesson.regions, lesson.head, self.student.head
        per_region = (
            regions.proposals,
            regions.head.logits,
            head.logits,
            regions.head.deltas,
            rescale_deltas(head.deltas, self.detector.head.box_weights, convention.box_weights),
            regions.labels,
            regions.gt_boxes,
        )
        options = self.settings.loss_spec(convention, reduction)._asdict()
        if not self.settings.feature:
            # The op wants features; one zero a region stands for them where only the heads transfer.
            nothing = regions.head.logits.new_zeros((len(regions.labels), 1, 1, 1))
            return ops.pooled_distill_loss(nothing, nothing, *per_region, **options)
        if self.reads_pooled:
            return ops.pooled_distill_loss(adapter(regions.head.pooled), head.pooled, *per_region, **options)
        return ops.region_distill_loss(
            [adapter(level) for level in student_pass.features],
            teacher_pass.features,
            *per_region,
            student_scales=student_pass.scales,
            teacher_scales=teacher_pass.scales,
            **(self.student.roi._asdict() | options),
        )

    def gaussian_loss(
        self, student_pass: StudentPass, teacher_pass: TeacherPass, boxes: Sequence[Tensor], adapter: nn.Module
    ) -> Tensor:
        """The term over whole feature maps, a scalar ().

        Args:
            boxes: N x (G, 4), those of :meth:`objects`.
            adapter: brings features from the student's channels to the teacher's.
        """
        if student_pass.scales != teacher_pass.scales:
            raise ValueError(
                "the gaussian term compares maps position by position and needs equal scales; student: "
                f"{student_pass.scales}, {self.name.removeprefix('the ')}: {teacher_pass.scales}"
            )
        return ops.gaussian_feature_loss(
            [adapter(level) for level in student_pass.features],
            teacher_pass.features,
            boxes,
            scales=student_pass.scales,
            sigma_squared=self.settings.sigma_squared,
        )

    def objects(self, student_pass: StudentPass) -> list[Tensor]:
        """Ground truth N x (G, 4) xyxy; boxes of classes that it does not teach are made empty: no mask has them."""
        boxes = [target["boxes"] for target in student_pass.targets]
        if not self.classes.is_partial:
            return boxes
        background = self.student.head.background
        labels = [self.classes.labels(target["labels"], background) for target in student_pass.targets]
        return [torch.where(label[:, None] >= 0, box, 0) for box, label in zip(boxes, labels)]
