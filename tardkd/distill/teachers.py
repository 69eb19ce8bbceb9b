"""One teacher beside the student: what of it runs in a step, and what it teaches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tardkd import ops
from tardkd.detectors import Detector, for_model
from tardkd.detectors.base import HeadOutputs, InputBatch, Regions, StudentPass, TeacherPass
from tardkd.device import run_beside
from tardkd.ops.reference import region_levels
from tardkd.ops.spec import Reduction

from . import checks
from .adapters import make_adapter, make_adapters, pair_levels
from .classes import ClassMap
from .conventions import common_coding, in_students_bins, in_students_terms, scores
from .settings import DistillSettings
from .sharing import nearest_proposals, rescale_deltas


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
        model: nn.Module | Detector,
        student: Detector,
        settings: DistillSettings,
        classes: ClassMap,
        name: str = "the teacher",
        adapter_key: str = "feature",
    ) -> None:
        self.detector, self.student, self.settings = for_model(model), student, settings
        self.classes, self.name, self.adapter_key = classes, name, adapter_key
        checks.check_separate(student.model, self.detector.model)
        checks.check_conventions(student.head, self.detector.head, named=classes.is_named)
        checks.check_sharing(settings.sharing, student, self.detector)
        if settings.distribution:
            checks.check_bins(student, self.detector)
        classes.check_widths(student.head, self.detector.head)
        self.model.eval().requires_grad_(False)
        self.seconds = 0.0  # of the host's time that it has taken so far: on a CPU all of its time
        self.ratio = settings.teacher_input_ratio or self.detector.input_size / student.input_size
        self.box_coding = common_coding(student.head, self.detector.head)
        self.reads_pooled = self._choose_path()
        # Pyramids whose channels differ from level to level are compared level by level: the student's level by each of
        # the teacher's. Of the others any level may meet any, and one adapter serves them all.
        self.level_pairs: list[int] | None = None
        if settings.compares_features and len({*student.channels}) + len({*self.detector.channels}) > 2:
            self.level_pairs = pair_levels(student.strides, [stride / self.ratio for stride in self.detector.strides])

    @property
    def model(self) -> nn.Module:
        """The frozen model itself."""
        return self.detector.model

    @property
    def reads_pyramid(self) -> bool:
        """Whether the feature term pools regions from the student's maps."""
        return self.settings.feature > 0 and not self.reads_pooled

    def _choose_path(self) -> bool:
        """Whether the feature term reads what the two box heads have pooled: possible if they pool alike."""
        student, teacher = self.student.roi, self.detector.roi
        alike = all(
            getattr(student, name) == getattr(teacher, name) for name in ("output_size", "sampling_ratio", "aligned")
        )
        if not (self.student.two_stage and self.detector.two_stage):
            if self.settings.path == "pooled":
                raise ValueError("path='pooled' needs two detectors with a box head that pools proposals")
            return False
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
        """Ask about those of the shared regions that it teaches."""
        convention, own = self.student.head, self.detector.head
        regions = self.classes.student_regions(shared, convention)
        with torch.no_grad(), self._timed():
            asked = regions
            if convention.regions == "objects" and self.detector.two_stage:
                # A box head that is given the object itself has little to do but to leave it where it is: that would
                # not tell whether it can find it. So it gets the nearest of its own proposals.
                nearest = nearest_proposals(regions, self.detector.teacher_proposals(teacher_pass))
                asked = replace(regions, proposals=nearest)
            head = self.detector.answers(teacher_pass, asked, self.classes.teacher_places(regions, convention))
            head = self.classes.teacher_outputs(head, own, convention.background)
            head = in_students_terms(head, own, convention, asked, self.box_coding)
        outputs = in_students_terms(regions.head, convention, convention, regions, self.box_coding)
        checks.check_head_widths(outputs.widths, head.widths)
        return Lesson(replace(regions, head=outputs), head)

    def make_adapter(self) -> nn.Module:
        """What brings the student's features to this teacher's channels, new."""
        if not self.settings.compares_features:
            return nn.Identity()
        like = next(self.student.model.parameters())
        if self.level_pairs is None:
            return make_adapter(self.student.channels[0], self.detector.channels[0], like)
        own = [self.student.channels[level] for level in self.level_pairs]
        return make_adapters(own, self.detector.channels, like)

    def _adapted(self, student_pass: StudentPass, adapter: nn.Module) -> tuple[list[Tensor], list[float]]:
        """The student's maps with this teacher's channels, L x (N, C_l, H_l, W_l), and their scales.

        Where levels are paired there is one for each of the teacher's levels.
        """
        maps, scales = student_pass.features, student_pass.scales
        if self.level_pairs is None:
            return [adapter(level) for level in maps], scales
        adapted = [adapt(maps[level]) for adapt, level in zip(adapter.children(), self.level_pairs)]
        return adapted, [scales[level] for level in self.level_pairs]

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
        own_boxes, their_boxes = regions.head.boxes, head.boxes
        if self.box_coding == "deltas":
            their_boxes = rescale_deltas(their_boxes, self.detector.head.box_weights, convention.box_weights)
        per_region = (
            regions.proposals,
            regions.head.logits,
            head.logits,
            own_boxes,
            their_boxes,
            regions.labels,
            regions.gt_boxes,
        )
        options: dict[str, Any] = self.settings.loss_spec(convention, reduction)._asdict()
        options |= {"region_weights": regions.weights, "box_coding": self.box_coding}
        # Where only one head rates its boxes, it would be judged by more than the other.
        if regions.head.quality is not None and head.quality is not None:
            for side, outputs in (("student", regions.head), ("teacher", head)):
                options[f"{side}_scores"] = scores(outputs, regions.labels, convention)
        if not self.settings.feature:
            of_features = ("feature_loss", "feature_norm", "bin_weight", "feature_gate")
            return ops.head_distill_loss(*per_region, **{k: v for k, v in options.items() if k not in of_features})
        if self.reads_pooled:
            pooled, theirs = regions.head.pooled, head.pooled
            assert pooled is not None and theirs is not None, "box heads pool their regions"
            return ops.pooled_distill_loss(adapter(pooled), theirs, *per_region, **options)
        maps, scales = self._adapted(student_pass, adapter)
        student_levels, teacher_levels = self._levels(regions, teacher_pass)
        tap = student_pass.tap  # which knows nothing of maps that an adapter has made
        return ops.region_distill_loss(
            maps,
            teacher_pass.features,
            *per_region,
            student_scales=scales,
            teacher_scales=teacher_pass.scales,
            student_levels=student_levels,
            teacher_levels=teacher_levels,
            tap=tap if tap is not None and tap.holds(maps) else None,
            **(self.student.roi._asdict() | options),
        )

    def distribution_loss(self, lesson: Lesson, gates: Tensor, reduction: Reduction) -> Tensor:
        """The term over distributions of boxes' sides, a scalar ().

        Args:
            lesson: R regions.
            gates: (R,) bool, open where the teacher's box may teach.
            reduction: "mean" or "sum" over the open gates.
        """
        own, theirs = lesson.regions.head.sides, lesson.head.sides
        assert own is not None and theirs is not None, "heads with bins say where each side is"
        temperature = self.settings.temperature
        taught = in_students_bins(theirs, own, temperature)
        return ops.distribution_distill_loss(
            own.logits.to(taught.dtype),
            taught,
            gates,
            temperature=temperature,
            region_weights=lesson.regions.weights,
            reduction=reduction,
        )

    def _levels(self, regions: Regions, teacher_pass: TeacherPass) -> tuple[Tensor | None, Tensor | None]:
        """(R,) levels that the regions are pooled from, the student's and the teacher's; None: by the regions' sizes.

        On equal grids both are the student's. Where levels are paired, the teacher's decides.
        """
        known, alike = regions.levels, regions.grid is not None and regions.grid == teacher_pass.grid
        if known is not None and alike:
            return known, known
        if self.level_pairs is None:
            return known, None
        roi = self.student.roi
        levels = region_levels(regions.boxes, teacher_pass.scales, roi.canonical_scale, roi.canonical_level)
        return levels, levels

    def gaussian_loss(
        self, student_pass: StudentPass, teacher_pass: TeacherPass, boxes: Sequence[Tensor], adapter: nn.Module
    ) -> Tensor:
        """The term over whole feature maps, a scalar ().

        Args:
            boxes: N x (G, 4), those of :meth:`objects`.
            adapter: brings features from the student's channels to the teacher's.
        """
        maps, scales = self._adapted(student_pass, adapter)
        if scales != teacher_pass.scales:
            raise ValueError(
                "the gaussian term compares maps position by position and needs equal scales; student: "
                f"{student_pass.scales}, {self.name.removeprefix('the ')}: {teacher_pass.scales}"
            )
        return ops.gaussian_feature_loss(
            maps, teacher_pass.features, boxes, scales=scales, sigma_squared=self.settings.sigma_squared
        )

    def objects(self, student_pass: StudentPass) -> list[Tensor]:
        """Ground truth N x (G, 4) xyxy; boxes of classes that it does not teach are made empty: no mask has them."""
        boxes = [target["boxes"] for target in student_pass.targets]
        if not self.classes.is_partial:
            return boxes
        background = self.student.head.background
        labels = [self.classes.labels(target["labels"], background) for target in student_pass.targets]
        return [torch.where(label[:, None] >= 0, box, 0) for box, label in zip(boxes, labels)]
