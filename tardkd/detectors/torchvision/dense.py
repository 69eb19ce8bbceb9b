"""torchvision's RetinaNet, FCOS, SSD and SSDLite as student or teacher: heads that answer for all of a grid.

A student's regions are its positives: the anchors, or points, to which its own training step has assigned an object. No
region is named of the background.

torchvision counts the background among the classes of these models, as class 0. The sigmoid heads of RetinaNet and FCOS
have a column for it, which nothing trains to mean anything: it is left out of what they say.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD

from tardkd.detectors.anchors import Anchors
from tardkd.detectors.answers import best_for
from tardkd.detectors.base import (
    Batch,
    Detector,
    HeadOutputs,
    HeadSettings,
    InputBatch,
    Regions,
    StudentPass,
    TeacherPass,
)
from tardkd.detectors.listening import recorded_calls, recorded_method
from tardkd.ops.modules import infer_scales
from tardkd.ops.spec import RoIAlignSpec

from .deploy import deployable_copy
from .inputs import (
    PROBE,
    dtype_of,
    exact,
    input_scale,
    input_size,
    longest_aspect,
    named,
    probe,
    recorded_inputs,
    teacher_batch,
)


class Grid(NamedTuple):
    """All that decides where the anchors of a batch stand: equal exactly where they are the same boxes."""

    generator: str  # its class and settings
    size: tuple[int, ...]  # (height, width) of the batch
    maps: tuple[tuple[int, ...], ...]  # L x (height, width)
    ratio: float  # pixels of this input per pixel of the student's


class DenseState(NamedTuple):
    """What a head has said of all A anchors of each image."""

    outputs: dict[str, Tensor]  # "cls_logits" (N, A, K'), "bbox_regression" (N, A, 4) and so on
    anchors: Tensor  # (N, A, 4) xyxy in pixels of the model's own input
    ratio: float  # these pixels per student-input pixel


class OneStageDetector(Detector):
    """What the three families have in common."""

    model: Any

    # --- what it is

    @cached_property
    def _maps(self) -> list[tuple[int, int, int]]:
        """Channels, height and width of each level for an empty image of the probe's size."""
        levels = probe(self.model.backbone, self._probed_size).values()
        return [(level.shape[1], level.shape[2], level.shape[3]) for level in levels]

    @property
    def _probed_size(self) -> tuple[int, int]:
        return PROBE, PROBE

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(channels for channels, _, _ in self._maps)

    @property
    def strides(self) -> tuple[float, ...]:
        return tuple(self._probed_size[0] / height for _, height, _ in self._maps)

    @property
    def input_size(self) -> float:
        return input_size(self.model.transform)

    @property
    def head(self) -> HeadSettings:
        return HeadSettings(
            background="first",
            activation="sigmoid",
            box_weights=(10.0, 10.0, 5.0, 5.0),
            widths=self._widths,
            box_coding="boxes",
            regions="anchors",
        )

    @property
    def _widths(self) -> tuple[int, int] | None:
        columns = getattr(self.model.head.classification_head, "num_classes", None)
        return None if columns is None else (columns - 1, 4)

    # --- as a student

    def student_pass(self, batch: Batch, on_inputs: Callable[[InputBatch], None] = lambda inputs: None) -> StudentPass:
        with (
            recorded_inputs(self.model.transform, on_inputs) as transformed,
            recorded_calls(self.model.backbone) as calls,
            recorded_method(self._assigned, "compute_loss") as assignments,
        ):
            output, losses = self.call(batch)
        [(inputs, targets)] = transformed
        maps = list(named(calls[self.model.backbone][1]).values())
        (_, outputs, anchors, matched), _ = assignments[0]
        if anchors[0].dtype in (torch.bfloat16, torch.float16):  # as autocast makes them: pixels off where it matters
            anchors = self._anchors(inputs.tensor, maps)
        return StudentPass(
            losses=losses,
            inputs=inputs,
            targets=targets,
            features=maps,
            scales=self._scales(maps, inputs),
            regions=self._positives(outputs, torch.stack(anchors), torch.stack(matched), targets, inputs, maps),
            output=output,
        )

    @property
    def _assigned(self) -> Any:
        """Whose ``compute_loss`` is told which anchors were matched with which objects."""
        return self.model.head

    def _positives(
        self,
        outputs: Mapping[str, Tensor],
        anchors: Tensor,
        matched: Tensor,
        targets: list[dict[str, Tensor]],
        inputs: InputBatch,
        maps: list[Tensor],
    ) -> Regions:
        """The regions of the anchors that have an object.

        Args:
            outputs: the head's, (N, A, columns) each.
            anchors: (N, A, 4) xyxy.
            matched: (N, A) int64, the object of each anchor among its image's; negative: none.
            targets: N dicts with at least "boxes" (G, 4) and "labels" (G,).
            inputs: the batch.
            maps: L x (N, C_l, H_l, W_l).
        """
        positive = matched >= 0
        counts = positive.sum(1).tolist()
        image, rows = positive.nonzero(as_tuple=True)
        before = matched.new_tensor([0, *accumulate(len(target["boxes"]) for target in targets)])[:-1]
        thing = before[image] + matched[image, rows]  # its number among the objects of all images
        gt_boxes = exact(torch.cat([target["boxes"] for target in targets])[thing])
        places = exact(anchors[image, rows])
        proposals = gt_boxes if self.head.regions == "objects" else places
        return Regions(
            proposals=list(proposals.split(counts)),
            labels=torch.cat([target["labels"] for target in targets])[thing],
            gt_boxes=gt_boxes,
            head=self._decoded({name: values[image, rows] for name, values in outputs.items()}, places),
            levels=self._levels(rows, maps),
            rows=rows,
            grid=self._grid(inputs.tensor, maps, 1.0),
        )

    def _levels(self, rows: Tensor, maps: list[Tensor]) -> Tensor:
        """(R,) int64: the level of each anchor, by its row (R,) among those of its image."""
        per_place = self.model.anchor_generator.num_anchors_per_location()
        ends = accumulate(level.shape[-2] * level.shape[-1] * count for level, count in zip(maps, per_place))
        levels = torch.zeros_like(rows)
        for end in list(ends)[:-1]:
            levels += rows >= end
        return levels

    # --- as a teacher

    def teacher_pass(self, images: Sequence[Tensor], inputs: InputBatch, ratio: float) -> TeacherPass:
        batch = self._teacher_batch(images, inputs, ratio)
        maps = list(named(self.model.backbone(batch.tensors)).values())
        outputs = self.model.head(maps)
        anchors = torch.stack(self._anchors(batch.tensors, maps))
        own = InputBatch(batch.tensors, batch.image_sizes, inputs.mean, inputs.std)
        return TeacherPass(
            features=maps,
            scales=[scale * ratio for scale in self._scales(maps, own)],
            state=DenseState(outputs, anchors, ratio),
            grid=self._grid(batch.tensors, maps, ratio),
        )

    def _teacher_batch(self, images: Sequence[Tensor], inputs: InputBatch, ratio: float) -> ImageList:
        return teacher_batch(self.model.transform, dtype_of(self.model.backbone), images, inputs, ratio)

    def answers(self, teacher_pass: TeacherPass, regions: Regions, classes: Tensor) -> HeadOutputs:
        outputs, anchors, ratio = teacher_pass.state
        if regions.rows is not None and regions.grid == teacher_pass.grid:
            image = regions.image_of_row()
            asked = {name: values[image, regions.rows] for name, values in outputs.items()}
            return self._decoded(asked, anchors[image, regions.rows], ratio)
        everything = {name: values.flatten(0, 1) for name, values in outputs.items()}
        return best_for(self._decoded(everything, anchors.flatten(0, 1), ratio), regions, classes, self.head)

    # --- anchors and boxes

    def _decoded(self, outputs: Mapping[str, Tensor], anchors: Tensor, ratio: float = 1.0) -> HeadOutputs:
        """What the head says of R anchors, its boxes in pixels of the student's input.

        Args:
            outputs: the head's, (R, columns) each.
            anchors: (R, 4) xyxy in pixels of the model's own input.
            ratio: these pixels per student-input pixel.
        """
        boxes = self._boxes(exact(outputs["bbox_regression"]), anchors) / ratio
        return HeadOutputs(self._logits(outputs), boxes, quality=self._quality(outputs))

    @abstractmethod
    def _boxes(self, regression: Tensor, anchors: Tensor) -> Tensor:
        """(R, 4) xyxy of the regression (R, 4) to the anchors (R, 4), as the model decodes it."""

    def _logits(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return outputs["cls_logits"][:, 1:]

    def _quality(self, outputs: Mapping[str, Tensor]) -> Tensor | None:
        return None

    def _anchors(self, tensor: Tensor, maps: list[Tensor]) -> list[Tensor]:
        """N x (A, 4) xyxy of a batch (N, 3, H, W) and its maps, L x (N, C_l, H_l, W_l); in float32 at least."""
        dtype = torch.promote_types(maps[0].dtype, torch.float32)
        shapes = [tensor.new_zeros((), dtype=dtype).expand(level.shape) for level in maps]  # of which it reads no value
        size = (tensor.shape[-2], tensor.shape[-1])
        return self.model.anchor_generator(ImageList(tensor, [size] * len(tensor)), shapes)

    def _grid(self, tensor: Tensor, maps: list[Tensor], ratio: float) -> Grid:
        generator = self.model.anchor_generator
        # The anchors of a cell follow from the other settings, and are tensors.
        settings = {
            name: value
            for name, value in sorted(vars(generator).items())
            if not name.startswith("_") and name not in ("cell_anchors", "training")
        }
        shapes = tuple(tuple(level.shape[-2:]) for level in maps)
        return Grid(f"{type(generator)} {settings}", tuple(tensor.shape[-2:]), shapes, ratio)

    def _scales(self, maps: list[Tensor], inputs: InputBatch) -> list[float]:
        """Of each level: feature pixels per pixel of the model's own input."""
        return infer_scales(maps, [(inputs.tensor.shape[-2], inputs.tensor.shape[-1])])

    # --- its parts

    def deployable(self) -> nn.Module:
        return deployable_copy(self.model)

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        return (self.model.head,)

    @property
    def class_tensors(self) -> tuple[str, ...]:
        return ("head.classification_head.cls_logits.",)

    def of_classes(self, state: Mapping[str, Tensor], columns: Sequence[int], count: int) -> dict[str, Tensor]:
        def cut(values: Tensor) -> Tensor:
            return values.unflatten(0, (-1, count))[:, list(columns)].flatten(0, 1)  # the classes of each anchor

        return {name: cut(values) if name.startswith(self.class_tensors) else values for name, values in state.items()}

    @property
    def longest_aspect(self) -> float:
        return longest_aspect(self.model.transform)

    def input_scale(self, sizes: Tensor) -> Tensor:
        return input_scale(self.model.transform, sizes)


class RetinaNetDetector(OneStageDetector):
    """Its regions are the positive anchors."""

    model: RetinaNet

    def _boxes(self, regression: Tensor, anchors: Tensor) -> Tensor:
        return self.model.box_coder.decode_single(regression, anchors)

    @property
    def roi(self) -> RoIAlignSpec:
        """A box of the size of the smallest anchor is pooled from the first level, where that anchor stands."""
        smallest = min(self.model.anchor_generator.sizes[0])
        return RoIAlignSpec(aligned=True, canonical_scale=smallest, canonical_level=_octave(self.strides[0]))

    @property
    def anchors(self) -> Anchors:
        generator = self.model.anchor_generator
        return Anchors(generator.sizes, generator.aspect_ratios, self.strides)


class FCOSDetector(OneStageDetector):
    """Its regions are the objects, one for each point that was assigned to it: a point has no box."""

    model: FCOS

    @property
    def head(self) -> HeadSettings:
        return replace(super().head, regions="objects")

    def _boxes(self, regression: Tensor, anchors: Tensor) -> Tensor:
        return self.model.box_coder.decode(regression, anchors)

    def _quality(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return exact(outputs["bbox_ctrness"])[:, 0].detach().sigmoid()

    @property
    def roi(self) -> RoIAlignSpec:
        """The first level has the objects that reach up to 8 strides from a point: most boxes of up to 16 strides."""
        return RoIAlignSpec(aligned=True, canonical_scale=8 * self.strides[0], canonical_level=_octave(self.strides[0]))


class SSDDetector(OneStageDetector):
    """SSD and SSDLite: all images are resized to one size, and each level has channels of its own."""

    model: SSD

    @property
    def _probed_size(self) -> tuple[int, int]:
        width, height = self.model.transform.fixed_size
        return height, width

    @property
    def _assigned(self) -> Any:
        return self.model

    @property
    def _widths(self) -> tuple[int, int] | None:
        columns = getattr(self.model.head.classification_head, "num_columns", None)
        return None if columns is None else (columns, 4)

    @property
    def head(self) -> HeadSettings:
        return replace(super().head, activation="softmax")

    @property
    def roi(self) -> RoIAlignSpec:
        """A box of the size of the first level's is pooled from that level."""
        generator = self.model.anchor_generator
        smallest = generator.scales[0] * self.input_size
        return RoIAlignSpec(aligned=True, canonical_scale=smallest, canonical_level=_octave(self.strides[0]))

    @property
    def class_tensors(self) -> tuple[str, ...]:
        """Of each level the last convolution of its class predictor: SSDLite has another one before it."""
        head = self.model.head.classification_head
        convolutions: dict[str, str] = {}
        for name, module in head.named_modules():
            if isinstance(module, nn.Conv2d):
                convolutions[".".join(name.split(".")[:2])] = name
        return tuple(f"head.classification_head.{name}." for name in convolutions.values())

    def _boxes(self, regression: Tensor, anchors: Tensor) -> Tensor:
        return self.model.box_coder.decode_single(regression, anchors)

    def _logits(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return outputs["cls_logits"]

    def _teacher_batch(self, images: Sequence[Tensor], inputs: InputBatch, ratio: float) -> ImageList:
        """Padded to the model's own size at least: of less its last levels have no pixel."""
        batch = super()._teacher_batch(images, inputs, ratio)
        missing = [max(0, own - side) for own, side in zip(self._probed_size, batch.tensors.shape[-2:])]
        if not any(missing):
            return batch
        return ImageList(F.pad(batch.tensors, (0, missing[1], 0, missing[0])), batch.image_sizes)

    def _scales(self, maps: list[Tensor], inputs: InputBatch) -> list[float]:
        """Exact quotients: SSD's levels do not halve each other."""
        return [level.shape[-2] / inputs.tensor.shape[-2] for level in maps]


def _octave(stride: float) -> int:
    """The level of a pyramid that has this stride, as the rule of levels counts them."""
    return round(math.log2(stride))
