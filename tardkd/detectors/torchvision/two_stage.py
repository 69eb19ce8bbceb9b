"""torchvision's GeneralizedRCNN (Faster, Mask, Keypoint R-CNN) as student or teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image

from tardkd import ops
from tardkd.detectors.anchors import Anchors
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
from tardkd.ops.fallback import has_kernels
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


class GeneralizedRCNNDetector(Detector):
    """Its regions are the sampled proposals; as a teacher its box head answers for any box."""

    two_stage = True
    model: GeneralizedRCNN

    @property
    def channels(self) -> tuple[int, ...]:
        return (self.model.backbone.out_channels,) * len(self.model.roi_heads.box_roi_pool.featmap_names)

    @property
    def strides(self) -> tuple[float, ...]:
        maps = probe(self.model.backbone)
        _, scales = self._pyramid(maps, [(PROBE, PROBE)])
        return tuple(1 / scale for scale in scales)

    @property
    def input_size(self) -> float:
        return input_size(self.model.transform)

    @property
    def roi(self) -> RoIAlignSpec:
        pool = self.model.roi_heads.box_roi_pool
        return RoIAlignSpec(
            output_size=tuple(pool.output_size),
            sampling_ratio=pool.sampling_ratio,
            aligned=getattr(pool, "aligned", False),
            canonical_scale=pool.canonical_scale,
            canonical_level=pool.canonical_level,
        )

    @property
    def head(self) -> HeadSettings:
        roi_heads = self.model.roi_heads
        widths = [
            layer.out_features
            for layer in (getattr(roi_heads.box_predictor, name, None) for name in ("cls_score", "bbox_pred"))
            if isinstance(layer, nn.Linear)
        ]
        return HeadSettings(
            background="first",
            activation="softmax",
            box_weights=tuple(roi_heads.box_coder.weights),
            widths=(widths[0], widths[1]) if len(widths) == 2 else None,
        )

    def student_pass(self, batch: Batch, on_inputs: Callable[[InputBatch], None] = lambda inputs: None) -> StudentPass:
        roi_heads = self.model.roi_heads
        with (
            recorded_inputs(self.model.transform, on_inputs) as transformed,
            recorded_calls(roi_heads.box_roi_pool, roi_heads.box_predictor) as calls,
            # To match proposals and objects once more would take many launches.
            recorded_method(roi_heads, "select_training_samples") as samples,
        ):
            output, losses = self.call(batch)
        [(inputs, targets)] = transformed
        (maps, proposals, _), pooled = calls[roi_heads.box_roi_pool]
        _, (logits, deltas) = calls[roi_heads.box_predictor]
        labels, gt_boxes = _matches(samples[0][1], targets)
        head = HeadOutputs(logits, deltas, pooled)
        features, scales = self._pyramid(maps, inputs.sizes)
        return StudentPass(
            losses=losses,
            inputs=inputs,
            targets=targets,
            features=features,
            scales=scales,
            regions=Regions([exact(boxes) for boxes in proposals], labels, gt_boxes, head),
            output=output,
        )

    def student_regions(self, student_pass: StudentPass, proposals: list[Tensor]) -> Regions:
        samples = self.model.roi_heads.select_training_samples(proposals, student_pass.targets)
        sampled = samples[0]
        labels, gt_boxes = _matches(samples, student_pass.targets)
        head = self._run_head(student_pass.features, student_pass.scales, sampled, student_pass.inputs.sizes)
        return Regions(sampled, labels, gt_boxes, head)

    def teacher_pass(self, images: Sequence[Tensor], inputs: InputBatch, ratio: float) -> TeacherPass:
        batch = teacher_batch(self.model.transform, dtype_of(self.model.backbone), images, inputs, ratio)
        maps = named(self.model.backbone(batch.tensors))
        features, scales = self._pyramid(maps, batch.image_sizes)
        state = (batch, maps, inputs.sizes, ratio)
        return TeacherPass(features, [scale * ratio for scale in scales], state)

    def teacher_proposals(self, teacher_pass: TeacherPass) -> list[Tensor]:
        batch, maps, student_sizes, ratio = teacher_pass.state
        dtype = dtype_of(self.model.rpn)
        batch = ImageList(batch.tensors.to(dtype), batch.image_sizes)  # the anchors take their dtype from the images
        proposals, _ = self.model.rpn(batch, {name: level.to(dtype) for name, level in maps.items()})
        return [clip_boxes_to_image(exact(boxes) / ratio, size) for boxes, size in zip(proposals, student_sizes)]

    def answers(self, teacher_pass: TeacherPass, regions: Regions, classes: Tensor) -> HeadOutputs:
        batch, _, _, ratio = teacher_pass.state
        scales = [scale / ratio for scale in teacher_pass.scales]
        boxes = [of_image * ratio for of_image in regions.proposals]
        return self._run_head(teacher_pass.features, scales, boxes, batch.image_sizes)

    def deployable(self) -> nn.Module:
        model = deployable_copy(self.model)
        pool = model.roi_heads.box_roi_pool
        model.roi_heads.box_roi_pool = MultiScaleRoIAlign(
            pool.featmap_names,
            pool.output_size,
            pool.sampling_ratio,
            canonical_scale=pool.canonical_scale,
            canonical_level=pool.canonical_level,
        )
        return model

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        roi_heads = self.model.roi_heads
        return self.model.rpn.head, roi_heads.box_head, roi_heads.box_predictor

    @property
    def class_tensors(self) -> tuple[str, ...]:
        return ("roi_heads.box_predictor.",)

    def of_classes(self, state: Mapping[str, Tensor], columns: Sequence[int], count: int) -> dict[str, Tensor]:
        def cut(values: Tensor) -> Tensor:
            return values.unflatten(0, (count, -1))[list(columns)].flatten(0, 1)  # 1 logit or 4 deltas a class

        return {name: cut(values) if name.startswith(self.class_tensors) else values for name, values in state.items()}

    @property
    def longest_aspect(self) -> float:
        return longest_aspect(self.model.transform)

    def input_scale(self, sizes: Tensor) -> Tensor:
        return input_scale(self.model.transform, sizes)

    @property
    def anchors(self) -> Anchors:
        generator = self.model.rpn.anchor_generator
        strides = tuple(PROBE / level.shape[-1] for level in probe(self.model.backbone).values())
        return Anchors(generator.sizes, generator.aspect_ratios, strides)

    @property
    def region_sampler(self) -> Any:
        return self.model.roi_heads.fg_bg_sampler

    def _pyramid(self, maps: dict[str, Tensor], sizes: list[tuple[int, int]]) -> tuple[list[Tensor], list[float]]:
        """The levels that the box head pools from, and their scales.

        A torchvision pool keeps the scales of its first call; before that they follow from the maps. Its level rule
        counts octaves from the first scale to the last, so that of several maps of one stride, as the MobileNet models
        have them, only the first is ever used.

        Args:
            maps: (N, C, H_l, W_l) each, what the backbone returns.
            sizes: N x (height, width) of the images inside the padding, in pixels of the same input.
        """
        pool = self.model.roi_heads.box_roi_pool
        features = [level for name, level in maps.items() if name in pool.featmap_names]
        scales = list(getattr(pool, "scales", None) or infer_scales(features, sizes))
        octaves = round(math.log2(scales[0] / scales[-1]))
        return features[: octaves + 1], scales[: octaves + 1]

    def _run_head(
        self, features: list[Tensor], scales: list[float], proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> HeadOutputs:
        """Pool the proposals and run the box head on them.

        Args:
            features: L x (N, C, H_l, W_l).
            scales: of each level: feature pixels per pixel of the model's own input.
            proposals: N x (R_n, 4) xyxy in pixels of the model's own input.
            sizes: N x (height, width) of the images inside the padding, in the same pixels.
        """
        roi_heads, pool = self.model.roi_heads, self.model.roi_heads.box_roi_pool
        dtype = dtype_of(roi_heads)
        known = type(pool) in (MultiScaleRoIAlign, ops.MultiScaleRoIAlign)
        if known and has_kernels(features[0].device):
            # The op pools all levels in one launch, does not wait for the device, and takes bfloat16.
            full = [exact(boxes) for boxes in proposals]
            pooled = ops.multiscale_roi_align(features, full, scales=scales, **self.roi._asdict())
        else:
            maps = {name: level.to(dtype) for name, level in zip(pool.featmap_names, features)}
            pooled = pool(maps, [boxes.to(dtype) for boxes in proposals], sizes)
        logits, deltas = roi_heads.box_predictor(roi_heads.box_head(pooled.to(dtype)))
        return HeadOutputs(logits, deltas, pooled)


def _matches(samples: tuple[Any, ...], targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Labels (R,) and matched ground truth (R, 4) xyxy of what ``select_training_samples`` chose.

    Args:
        samples: what it returned.
        targets: N dicts with at least "boxes" (G, 4) xyxy.
    """
    _, indices, labels, _ = samples
    matched = [
        target["boxes"][index] if len(target["boxes"]) else target["boxes"].new_zeros((len(index), 4))
        for target, index in zip(targets, indices)
    ]
    return torch.cat(labels), exact(torch.cat(matched))
