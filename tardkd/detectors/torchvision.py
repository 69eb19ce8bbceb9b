"""torchvision's GeneralizedRCNN (Faster, Mask, Keypoint R-CNN) as student or teacher."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image

from tardkd.ops.modules import infer_scales

from .base import HeadOutputs, HeadSettings, InputBatch, Regions, RoISettings, StudentPass, TeacherPass


@contextmanager
def first_calls(*modules: nn.Module) -> Iterator[dict[nn.Module, tuple[tuple[Any, ...], Any]]]:
    """Record ``(args, output)`` of each module's first call; no trace is left on the modules afterwards."""
    calls: dict[nn.Module, tuple[tuple[Any, ...], Any]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.setdefault(module, (args, output))

    handles = [module.register_forward_hook(record) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class GeneralizedRCNNAdapter:
    """Implements :class:`tardkd.detectors.base.DetectorAdapter`; the model itself is never changed."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        self.model = model

    @property
    def channels(self) -> int:
        return self.model.backbone.out_channels

    @property
    def input_size(self) -> float:
        transform = self.model.transform
        return min(transform.fixed_size) if transform.fixed_size else transform.min_size[-1]

    @property
    def roi(self) -> RoISettings:
        pool = self.model.roi_heads.box_roi_pool
        return RoISettings(
            tuple(pool.output_size),
            pool.sampling_ratio,
            getattr(pool, "aligned", False),
            pool.canonical_scale,
            pool.canonical_level,
        )

    @property
    def head(self) -> HeadSettings:
        roi_heads = self.model.roi_heads
        layers = [getattr(roi_heads.box_predictor, name, None) for name in ("cls_score", "bbox_pred")]
        known = all(isinstance(layer, nn.Linear) for layer in layers)
        return HeadSettings(
            background="first",
            activation="softmax",
            box_weights=tuple(roi_heads.box_coder.weights),
            widths=(layers[0].out_features, layers[1].out_features) if known else None,
        )

    def student_pass(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> StudentPass:
        model, transform, roi_heads = self.model, self.model.transform, self.model.roi_heads
        with first_calls(transform, roi_heads.box_roi_pool, roi_heads.box_predictor) as calls:
            losses = model(images, targets)
        _, (batch, targets) = calls[transform]
        (maps, proposals, _), pooled = calls[roi_heads.box_roi_pool]
        _, (logits, deltas) = calls[roi_heads.box_predictor]
        labels, gt_boxes = self._match(proposals, targets)
        head = HeadOutputs(logits, deltas, pooled)
        mean, std = tuple(transform.image_mean), tuple(transform.image_std)
        features, scales = self._pyramid(maps, batch.image_sizes)
        return StudentPass(
            losses=losses,
            inputs=InputBatch(batch.tensors, batch.image_sizes, mean, std),
            targets=targets,
            features=features,
            scales=scales,
            regions=Regions([_exact(boxes) for boxes in proposals], labels, gt_boxes, head),
        )

    def student_regions(self, student: StudentPass, proposals: list[Tensor]) -> Regions:
        roi_heads = self.model.roi_heads
        proposals, *_ = roi_heads.select_training_samples(proposals, student.targets)
        labels, gt_boxes = self._match(proposals, student.targets)
        head = self._run_head(student.features, proposals, student.inputs.sizes)
        return Regions(proposals, labels, gt_boxes, head)

    def teacher_pass(self, images: Sequence[Tensor], student: StudentPass, ratio: float) -> TeacherPass:
        batch = self._teacher_batch(images, student.inputs, ratio)
        maps = self.model.backbone(batch.tensors)
        if isinstance(maps, Tensor):
            maps = {"0": maps}
        features, scales = self._pyramid(maps, batch.image_sizes)
        state = (batch, maps, student.inputs.sizes, ratio)
        return TeacherPass(features, [scale * ratio for scale in scales], state)

    def teacher_proposals(self, teacher: TeacherPass) -> list[Tensor]:
        batch, maps, student_sizes, ratio = teacher.state
        proposals, _ = self.model.rpn(batch, maps)
        return [
            clip_boxes_to_image(_exact(boxes) / ratio, size) for boxes, size in zip(proposals, student_sizes)
        ]

    def teacher_head(self, teacher: TeacherPass, proposals: list[Tensor]) -> HeadOutputs:
        batch, _, _, ratio = teacher.state
        boxes = [(boxes * ratio).to(batch.tensors.dtype) for boxes in proposals]
        return self._run_head(teacher.features, boxes, batch.image_sizes)

    def _teacher_batch(self, images: Sequence[Tensor], inputs: InputBatch, ratio: float) -> ImageList:
        """The student's own batch where the teacher would have made the same, else one of its own."""
        transform = self.model.transform
        dtype = next(self.model.parameters()).dtype
        same_values = (tuple(transform.image_mean), tuple(transform.image_std)) == (inputs.mean, inputs.std)
        padded = all(side % transform.size_divisible == 0 for side in inputs.tensor.shape[-2:])
        if ratio == 1 and same_values and padded:
            return ImageList(inputs.tensor.to(dtype), inputs.sizes)
        sizes = [(round(height * ratio), round(width * ratio)) for height, width in inputs.sizes]
        resized = [
            F.interpolate(transform.normalize(image)[None], size, mode="bilinear", align_corners=False)[0]
            for image, size in zip(images, sizes)
        ]
        batch = transform.batch_images(resized, size_divisible=transform.size_divisible)
        return ImageList(batch.to(dtype), sizes)

    def _pyramid(
        self, maps: dict[str, Tensor], sizes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[float]]:
        """The levels that the box head pools from, and their scales.

        A torchvision pool keeps the scales of its first call; before that they follow from the maps. Its
        level rule counts octaves from the first scale to the last, so that of several maps of one stride (as
        in the MobileNet models) only the first is ever used.
        """
        pool = self.model.roi_heads.box_roi_pool
        features = [level for name, level in maps.items() if name in pool.featmap_names]
        scales = list(getattr(pool, "scales", None) or infer_scales(features, sizes))
        octaves = round(math.log2(scales[0] / scales[-1]))
        return features[: octaves + 1], scales[: octaves + 1]

    def _match(self, proposals: list[Tensor], targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """Labels (R,) and matched ground truth (R, 4); nothing is random here, so it can be repeated."""
        gt_boxes = [target["boxes"] for target in targets]
        indices, labels = self.model.roi_heads.assign_targets_to_proposals(
            proposals,
            [boxes.to(p.dtype) for boxes, p in zip(gt_boxes, proposals)],
            [target["labels"] for target in targets],
        )
        matched = [
            boxes[index] if len(boxes) else boxes.new_zeros((len(index), 4))
            for boxes, index in zip(gt_boxes, indices)
        ]
        return torch.cat(labels), _exact(torch.cat(matched))

    def _run_head(
        self, features: list[Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> HeadOutputs:
        roi_heads = self.model.roi_heads
        pool = roi_heads.box_roi_pool
        pooled = pool(dict(zip(pool.featmap_names, features)), proposals, sizes)
        logits, deltas = roi_heads.box_predictor(roi_heads.box_head(pooled))
        return HeadOutputs(logits, deltas, pooled)


def _exact(boxes: Tensor) -> Tensor:
    """Boxes in float32 at least: torchvision's are narrower under autocast."""
    return boxes.to(torch.promote_types(boxes.dtype, torch.float32))
