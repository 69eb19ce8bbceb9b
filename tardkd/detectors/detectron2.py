"""Detectron2's Faster R-CNN (Mask, Keypoint) with FPN and RetinaNet as student or teacher.

Models are recognised by the names of their classes; Detectron2 itself is imported by no line before a teacher needs its
boxes. A distiller is called as its models are: with a list of dicts, "image" and "instances", inside an EventStorage.
Detectron2 resizes images before the model sees them, so that the nominal size of all its models is the same here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tardkd.ops.spec import RoIAlignSpec

from .base import (
    Batch,
    Detections,
    Detector,
    HeadOutputs,
    HeadSettings,
    InputBatch,
    Regions,
    StudentPass,
    TeacherPass,
)
from .dense import DenseDetector, matched_regions, resized_batch
from .listening import recorded_calls, recorded_method

NOMINAL_SIZE = 800.0  # pixels of the short side in its own recipes; teacher_input_ratio says otherwise


def detector_of(model: nn.Module) -> Detector | None:
    """The model in the terms of its family; None if it is of another library, or a cascade or without an FPN."""
    names = {kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("detectron2.")}
    if "RetinaNet" in names:
        return Detectron2RetinaNet(model)
    roi_heads: Any = getattr(model, "roi_heads", None)
    if "GeneralizedRCNN" in names and hasattr(roi_heads, "box_pooler"):
        return None if isinstance(roi_heads.box_predictor, nn.ModuleList) else Detectron2RCNN(model)
    return None


class Detectron2Detector(Detector):
    """What the two have in common: the call, and images of 0 to 255 whose channels stand in the model's order."""

    model: Any

    @property
    def channels(self) -> tuple[int, ...]:
        shapes = self.model.backbone.output_shape()
        return tuple(shapes[name].channels for name in self._levels)

    @property
    def strides(self) -> tuple[float, ...]:
        shapes = self.model.backbone.output_shape()
        return tuple(float(shapes[name].stride) for name in self._levels)

    @property
    def input_size(self) -> float:
        return NOMINAL_SIZE

    @property
    def _levels(self) -> Sequence[str]:
        """The names of the levels that the head reads."""
        raise NotImplementedError

    # --- images

    @property
    def _is_bgr(self) -> bool:
        return getattr(self.model, "input_format", "BGR") == "BGR"

    def _in_order(self, image: Tensor, dim: int) -> Tensor:
        """Channels along ``dim`` from the model's order to red, green, blue, or back."""
        return image.flip(dim) if self._is_bgr else image

    @cached_property
    def _normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of images in [0, 1], one value a channel: red, green, blue."""
        mean, std = (
            tuple(self._in_order(values.detach().flatten().double().cpu() / 255, 0).tolist())
            for values in (self.model.pixel_mean, self.model.pixel_std)
        )
        return mean, std

    # --- the call

    def read_call(self, batched_inputs: Sequence[dict[str, Any]]) -> Batch:  # type: ignore[override]
        device = self.model.pixel_mean.device
        images = [self._in_order(given["image"].to(device), 0).float() / 255 for given in batched_inputs]
        targets = [
            {
                "boxes": given["instances"].gt_boxes.tensor.to(device),
                "labels": given["instances"].gt_classes.to(device),
            }
            for given in batched_inputs
        ]
        return Batch(images, targets, call={"batched_inputs": batched_inputs})

    def call(self, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
        assert batch.call is not None
        losses = self.model(batch.call["batched_inputs"])
        return losses, losses

    @contextmanager
    def _inputs(self, batch: Batch, on_inputs: Callable[[InputBatch], None]) -> Iterator[list[InputBatch]]:
        """Record the batch that the backbone is going to see, and hand it on as soon as it is there."""
        seen: list[InputBatch] = []
        sizes = [(image.shape[-2], image.shape[-1]) for image in batch.images]

        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(InputBatch(self._in_order(args[0], 1), sizes, *self._normalisation))
            on_inputs(seen[-1])

        handle = self.model.backbone.register_forward_pre_hook(record)
        try:
            yield seen
        finally:
            handle.remove()

    def _run_backbone(
        self, images: Sequence[Tensor], inputs: InputBatch, ratio: float
    ) -> tuple[InputBatch, dict[str, Tensor]]:
        """A teacher's batch and all levels of its pyramid, (N, C_l, H_l, W_l), by name."""
        mean, std = self._normalisation
        dtype = next(self.model.backbone.parameters()).dtype
        multiple = max(1, self.model.backbone.size_divisibility)
        own = resized_batch(images, inputs, ratio, dtype, mean=mean, std=std, multiple=multiple)
        return own, self.model.backbone(self._in_order(own.tensor, 1))

    def detect(self, images: Sequence[Tensor]) -> list[Detections]:
        outputs = self.model([{"image": self._in_order(image, 0) * 255} for image in images])
        found = [output["instances"] for output in outputs]
        return [{"boxes": each.pred_boxes.tensor, "labels": each.pred_classes, "scores": each.scores} for each in found]


class Detectron2RCNN(Detectron2Detector):
    """Its regions are the sampled proposals; as a teacher its box head answers for any box."""

    two_stage = True

    @property
    def _levels(self) -> Sequence[str]:
        return self.model.roi_heads.box_in_features

    @property
    def roi(self) -> RoIAlignSpec:
        pooler = self.model.roi_heads.box_pooler
        first = pooler.level_poolers[0]
        return RoIAlignSpec(
            output_size=tuple(pooler.output_size),
            sampling_ratio=first.sampling_ratio,
            aligned=first.aligned,
            canonical_scale=pooler.canonical_box_size,
            canonical_level=pooler.canonical_level,
        )

    @property
    def head(self) -> HeadSettings:
        predictor = self.model.roi_heads.box_predictor
        return HeadSettings(
            background="last",
            activation="softmax",
            box_weights=tuple(predictor.box2box_transform.weights),
            widths=(predictor.cls_score.out_features, predictor.bbox_pred.out_features),
        )

    def student_pass(self, batch: Batch, on_inputs: Callable[[InputBatch], None] = lambda inputs: None) -> StudentPass:
        roi_heads = self.model.roi_heads
        with (
            self._inputs(batch, on_inputs) as seen,
            recorded_calls(roi_heads.box_pooler, roi_heads.box_predictor) as calls,
            recorded_method(roi_heads, "label_and_sample_proposals") as samples,
        ):
            output, losses = self.call(batch)
        (features, _), pooled = calls[roi_heads.box_pooler]
        logits, deltas = calls[roi_heads.box_predictor][1]
        sampled = samples[0][1]  # N Instances; one of an image without objects has no ground truth
        proposals = [_exact(of_image.proposal_boxes.tensor) for of_image in sampled]
        gt_boxes = [
            _exact(of_image.gt_boxes.tensor) if of_image.has("gt_boxes") else torch.zeros_like(boxes)
            for of_image, boxes in zip(sampled, proposals)
        ]
        return StudentPass(
            losses=losses,
            inputs=seen[0],
            targets=list(batch.targets),
            features=list(features),
            scales=[pooler.spatial_scale for pooler in roi_heads.box_pooler.level_poolers],
            regions=Regions(
                proposals,
                torch.cat([of_image.gt_classes for of_image in sampled]),
                torch.cat(gt_boxes),
                HeadOutputs(logits, deltas, pooled),
            ),
            output=output,
        )

    def teacher_pass(self, images: Sequence[Tensor], inputs: InputBatch, ratio: float) -> TeacherPass:
        batch, maps = self._run_backbone(images, inputs, ratio)
        scales = [pooler.spatial_scale * ratio for pooler in self.model.roi_heads.box_pooler.level_poolers]
        return TeacherPass([maps[name] for name in self._levels], scales, (batch, maps, ratio))

    def teacher_proposals(self, teacher_pass: TeacherPass) -> list[Tensor]:
        from detectron2.structures import ImageList

        batch, maps, ratio = teacher_pass.state
        generator = self.model.proposal_generator
        dtype = next(generator.parameters()).dtype
        images = ImageList(batch.tensor, batch.sizes)
        proposals, _ = generator(images, {name: level.to(dtype) for name, level in maps.items()}, None)
        return [_exact(of_image.proposal_boxes.tensor) / ratio for of_image in proposals]

    def answers(self, teacher_pass: TeacherPass, regions: Regions, classes: Tensor) -> HeadOutputs:
        from detectron2.structures import Boxes

        roi_heads, (_, _, ratio) = self.model.roi_heads, teacher_pass.state
        dtype = next(roi_heads.parameters()).dtype
        maps = [level.to(dtype) for level in teacher_pass.features]
        boxes = [Boxes((of_image * ratio).to(dtype)) for of_image in regions.proposals]
        pooled = roi_heads.box_pooler(maps, boxes)
        logits, deltas = roi_heads.box_predictor(roi_heads.box_head(pooled))
        return HeadOutputs(logits, deltas, pooled)


class Detectron2RetinaNet(Detectron2Detector, DenseDetector):
    """Its regions are its positive anchors; no region is named of the background."""

    @property
    def _levels(self) -> Sequence[str]:
        return self.model.head_in_features

    @property
    def head(self) -> HeadSettings:
        return HeadSettings(
            background="last",
            activation="sigmoid",
            box_weights=(10.0, 10.0, 5.0, 5.0),
            widths=(self.model.num_classes, 4),
            box_coding="boxes",
            regions="anchors",
        )

    def student_pass(self, batch: Batch, on_inputs: Callable[[InputBatch], None] = lambda inputs: None) -> StudentPass:
        with (
            self._inputs(batch, on_inputs) as seen,
            recorded_calls(self.model.head) as calls,
            recorded_method(self.model, "label_anchors") as labelled,
        ):
            output, losses = self.call(batch)
        (features,), predictions = calls[self.model.head]
        (anchors, _), (labels, gt_boxes) = labelled[0]
        labels = torch.stack(labels)
        logits, boxes, places, levels = self._read(predictions, anchors)
        return StudentPass(
            losses=losses,
            inputs=seen[0],
            targets=list(batch.targets),
            features=list(features),
            scales=[1 / stride for stride in self.strides],
            regions=matched_regions(
                logits,
                boxes,
                (labels >= 0) & (labels != self.model.num_classes),
                labels,
                torch.stack(gt_boxes),
                anchors=places.expand(len(labels), -1, 4),
                levels=levels,
                grid=self._grid(features, 1.0),
            ),
            output=output,
        )

    def teacher_pass(self, images: Sequence[Tensor], inputs: InputBatch, ratio: float) -> TeacherPass:
        _, maps = self._run_backbone(images, inputs, ratio)
        features = [maps[name] for name in self._levels]
        logits, boxes, _, _ = self._read(self.model.head(features), self.model.anchor_generator(features))
        outputs = HeadOutputs(logits.flatten(0, 1), boxes.flatten(0, 1) / ratio)
        return TeacherPass(features, [ratio / stride for stride in self.strides], outputs, self._grid(features, ratio))

    def _read(self, predictions: tuple[list[Tensor], list[Tensor]], anchors: Sequence[Any]) -> tuple[Tensor, ...]:
        """Logits (N, A, K), boxes (N, A, 4) xyxy, anchors (A, 4) and their levels (A,), in pixels of its own input.

        Args:
            predictions: L x (N, A_l x K, H_l, W_l) logits and L x (N, A_l x 4, H_l, W_l) deltas.
            anchors: L Boxes.
        """
        logits, deltas = (
            torch.cat([_by_anchor(level, width) for level in maps], dim=1)
            for maps, width in zip(predictions, (self.model.num_classes, 4))
        )
        places = _exact(torch.cat([of_level.tensor for of_level in anchors]))
        repeated = places.repeat(len(deltas), 1)
        boxes = self.model.box2box_transform.apply_deltas(_exact(deltas).flatten(0, 1), repeated).view_as(deltas)
        counts = torch.tensor([len(of_level.tensor) for of_level in anchors], device=places.device)
        return logits, boxes, places, torch.arange(len(counts), device=places.device).repeat_interleave(counts)

    @cached_property
    def _cell_anchors(self) -> tuple[Any, ...]:
        generator = self.model.anchor_generator
        return (
            tuple(str(level.tolist()) for level in generator.cell_anchors),
            tuple(generator.strides),
            generator.offset,
        )

    def _grid(self, features: Sequence[Tensor], ratio: float) -> tuple[Any, ...]:
        """All that decides where the anchors stand, in pixels of the student's input."""
        return self._cell_anchors, tuple(tuple(level.shape[-2:]) for level in features), ratio


def _by_anchor(level: Tensor, width: int) -> Tensor:
    """(N, A_l x width, H, W) as (N, H x W x A_l, width)."""
    images, _, height, columns = level.shape
    return level.view(images, -1, width, height, columns).permute(0, 3, 4, 1, 2).reshape(images, -1, width)


def _exact(boxes: Tensor) -> Tensor:
    """Boxes, of any shape, in float32 at least."""
    return boxes.to(torch.promote_types(boxes.dtype, torch.float32))
