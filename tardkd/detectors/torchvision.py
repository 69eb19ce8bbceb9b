"""torchvision's GeneralizedRCNN (Faster, Mask, Keypoint R-CNN) as student or teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image

from tardkd import ops
from tardkd.ops.fallback import has_kernels
from tardkd.ops.modules import infer_scales
from tardkd.ops.spec import RoIAlignSpec

from .base import HeadOutputs, HeadSettings, InputBatch, Regions, StudentPass, TeacherPass


@contextmanager
def recorded_calls(*modules: nn.Module) -> Iterator[dict[nn.Module, tuple[tuple[Any, ...], Any]]]:
    """Record ``(args, output)`` of the first call of each module; no trace is left on the modules afterwards."""
    calls: dict[nn.Module, tuple[tuple[Any, ...], Any]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.setdefault(module, (args, output))

    handles = [module.register_forward_hook(record) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_samples(roi_heads: Any) -> Iterator[list[tuple[Any, ...]]]:
    """Record what ``roi_heads.select_training_samples`` returns.

    To match proposals and objects once more would take many launches.
    """
    samples: list[tuple[Any, ...]] = []
    select, is_own = roi_heads.select_training_samples, "select_training_samples" in vars(roi_heads)

    def record(*args: Any) -> tuple[Any, ...]:
        samples.append(select(*args))
        return samples[-1]

    roi_heads.select_training_samples = record
    try:
        yield samples
    finally:
        if is_own:  # somebody else had put a function of their own onto this object
            roi_heads.select_training_samples = select
        else:
            del roi_heads.select_training_samples


class GeneralizedRCNNDetector:
    """Implements :class:`tardkd.detectors.base.Detector`; the model itself is never changed."""

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

    def student_pass(
        self,
        images: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
        on_inputs: Callable[[InputBatch], None] = lambda inputs: None,
    ) -> StudentPass:
        model, transform, roi_heads = self.model, self.model.transform, self.model.roi_heads
        mean, std = tuple(transform.image_mean), tuple(transform.image_std)
        transformed: list[tuple[InputBatch, list[dict[str, Tensor]]]] = []

        def record_inputs(module: nn.Module, args: tuple[Any, ...], output: tuple[ImageList, Any]) -> None:
            batch, resized_targets = output
            inputs = InputBatch(batch.tensors, batch.image_sizes, mean, std)
            transformed.append((inputs, resized_targets))
            on_inputs(inputs)

        handle = transform.register_forward_hook(record_inputs)
        try:
            modules = (roi_heads.box_roi_pool, roi_heads.box_predictor)
            with recorded_calls(*modules) as calls, recorded_samples(roi_heads) as samples:
                losses = model(images, targets)
        finally:
            handle.remove()
        [(inputs, targets)] = transformed
        (maps, proposals, _), pooled = calls[roi_heads.box_roi_pool]
        _, (logits, deltas) = calls[roi_heads.box_predictor]
        labels, gt_boxes = _matches(samples[0], targets)
        head = HeadOutputs(logits, deltas, pooled)
        features, scales = self._pyramid(maps, inputs.sizes)
        return StudentPass(
            losses=losses,
            inputs=inputs,
            targets=targets,
            features=features,
            scales=scales,
            regions=Regions([_exact(boxes) for boxes in proposals], labels, gt_boxes, head),
        )

    def student_regions(self, student_pass: StudentPass, proposals: list[Tensor]) -> Regions:
        samples = self.model.roi_heads.select_training_samples(proposals, student_pass.targets)
        sampled = samples[0]
        labels, gt_boxes = _matches(samples, student_pass.targets)
        head = self._run_head(student_pass.features, student_pass.scales, sampled, student_pass.inputs.sizes)
        return Regions(sampled, labels, gt_boxes, head)

    def teacher_pass(self, images: Sequence[Tensor], inputs: InputBatch, ratio: float) -> TeacherPass:
        batch = self._teacher_batch(images, inputs, ratio)
        maps = self.model.backbone(batch.tensors)
        if isinstance(maps, Tensor):
            maps = {"0": maps}
        features, scales = self._pyramid(maps, batch.image_sizes)
        state = (batch, maps, inputs.sizes, ratio)
        return TeacherPass(features, [scale * ratio for scale in scales], state)

    def teacher_proposals(self, teacher_pass: TeacherPass) -> list[Tensor]:
        batch, maps, student_sizes, ratio = teacher_pass.state
        dtype = dtype_of(self.model.rpn)
        batch = ImageList(batch.tensors.to(dtype), batch.image_sizes)  # the anchors take their dtype from the images
        proposals, _ = self.model.rpn(batch, {name: level.to(dtype) for name, level in maps.items()})
        return [clip_boxes_to_image(_exact(boxes) / ratio, size) for boxes, size in zip(proposals, student_sizes)]

    def teacher_head(self, teacher_pass: TeacherPass, proposals: list[Tensor]) -> HeadOutputs:
        batch, _, _, ratio = teacher_pass.state
        scales = [scale / ratio for scale in teacher_pass.scales]
        return self._run_head(teacher_pass.features, scales, [boxes * ratio for boxes in proposals], batch.image_sizes)

    def _teacher_batch(self, images: Sequence[Tensor], inputs: InputBatch, ratio: float) -> ImageList:
        """The student's own batch where the teacher would have made the same, else one of its own.

        Args:
            images: N x (3, H, W) in [0, 1].
        """
        transform = self.model.transform
        dtype = dtype_of(self.model.backbone)
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
            exact = [_exact(boxes) for boxes in proposals]
            pooled = ops.multiscale_roi_align(features, exact, scales=scales, **self.roi._asdict())
        else:
            maps = {name: level.to(dtype) for name, level in zip(pool.featmap_names, features)}
            pooled = pool(maps, [boxes.to(dtype) for boxes in proposals], sizes)
        logits, deltas = roi_heads.box_predictor(roi_heads.box_head(pooled.to(dtype)))
        return HeadOutputs(logits, deltas, pooled)


# The name that the class had before "adapter" came to mean a layer alone.
GeneralizedRCNNAdapter = GeneralizedRCNNDetector


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of the module's parameters."""
    return next(module.parameters()).dtype


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
    return torch.cat(labels), _exact(torch.cat(matched))


def _exact(boxes: Tensor) -> Tensor:
    """Boxes (R, 4) in float32 at least: torchvision's have fewer digits under autocast."""
    return boxes.to(torch.promote_types(boxes.dtype, torch.float32))
