"""The ops as modules: options in the constructor, tensors in the call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .functional import (
    distribution_distill_loss,
    gaussian_feature_loss,
    head_distill_loss,
    multiscale_roi_align,
    pooled_distill_loss,
    region_distill_loss,
)
from .inputs import RegionLosses
from .spec import MAX_SAMPLES, LossSpec, RoIAlignSpec, integer, output_pair, positive


class MultiScaleRoIAlign(nn.Module):
    """Drop-in for ``torchvision.ops.MultiScaleRoIAlign``: same constructor, same call, same result.

    Pools all levels at once, without a device synchronisation a level, and has a faster backward. TorchScript cannot
    know this op: ``torch.jit.script`` puts torchvision's pooler of the same settings in its place, so that the file
    runs where tardkd is not installed. It does so in the model that it is given; script a ``copy.deepcopy`` to go on
    training with this one.

    Args:
        featmap_names: keys of the feature maps to pool from, finest first.
        output_size: bins a side, an int or (height, width).
        sampling_ratio: samples a bin and axis; 0 or less: adaptive.
        canonical_scale, canonical_level: of the level rule (FPN, Lin et al. 2017, eq. 1).
    """

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        self.featmap_names = featmap_names
        self.output_size = output_pair(output_size)
        self.sampling_ratio = integer("sampling_ratio", sampling_ratio, high=MAX_SAMPLES)
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool ``boxes``, N tensors (R_n, 4) xyxy, from the maps ``x``; ``image_shapes``: N (height, width) in pixels.

        Returns (sum R_n, C, *output_size).
        """
        features = [feature for name, feature in x.items() if name in self.featmap_names]
        if not features:
            raise ValueError(f"none of the maps {list(x)} is among featmap_names {self.featmap_names}")
        # Under autocast torchvision's RoIHeads pass boxes in the features' dtype.
        boxes = [box.to(torch.promote_types(box.dtype, torch.float32)) for box in boxes]
        return multiscale_roi_align(
            features,
            boxes,
            scales=infer_scales(features, image_shapes),
            output_size=self.output_size,
            sampling_ratio=self.sampling_ratio,
            canonical_scale=self.canonical_scale,
            canonical_level=self.canonical_level,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in place of this module, in whatever model it is."""
        from torchvision import ops  # the one thing here that needs torchvision

        return ops.MultiScaleRoIAlign(
            self.featmap_names,
            self.output_size,
            self.sampling_ratio,
            canonical_scale=self.canonical_scale,
            canonical_level=self.canonical_level,
        )

    def extra_repr(self) -> str:
        return (
            f"featmap_names={self.featmap_names}, output_size={self.output_size}, sampling_ratio={self.sampling_ratio}"
        )


def infer_scales(features: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]) -> list[float]:
    """Scale of each map, the power of two nearest to map height / largest image height, as torchvision infers it."""
    if not image_shapes:
        raise ValueError("image_shapes is empty: the scales of the maps follow from the images' sizes")
    height = max(shape[0] for shape in image_shapes)
    if height < 1:
        raise ValueError(f"image_shapes must hold (height, width) of at least a pixel, got {list(image_shapes)}")
    return [2.0 ** round(math.log2(feature.shape[-2] / height)) for feature in features]


class _Loss(nn.Module):
    """A functional loss with its options bound; unknown options and values are refused at construction."""

    function: Any

    def __init__(self, **options: Any) -> None:
        super().__init__()
        parameters = inspect.signature(type(self).function).parameters.values()
        known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        for key in options:
            if key not in known:
                raise TypeError(f"{type(self).__name__} has no option {key!r}; it takes {', '.join(known)}")
        _check_values(options)
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.options.items())


def _check_values(options: dict[str, Any]) -> None:
    """What the call would refuse is refused here."""
    LossSpec(**{key: value for key, value in options.items() if key in LossSpec._fields}).checked()
    align: dict[str, Any] = {**RoIAlignSpec._field_defaults, **options}
    RoIAlignSpec.checked(**{key: align[key] for key in RoIAlignSpec._fields})
    if "sigma_squared" in options:
        positive("sigma_squared", options["sigma_squared"])


class RegionDistillLoss(_Loss):
    """:func:`tardkd.ops.region_distill_loss` with any of its keyword arguments bound; the others go with the call."""

    function = staticmethod(region_distill_loss)

    def forward(self, *tensors: Any, **keywords: Any) -> RegionLosses:
        return region_distill_loss(*tensors, **{**self.options, **keywords})


class PooledDistillLoss(_Loss):
    """:func:`tardkd.ops.pooled_distill_loss` with any of its keyword arguments bound; the others go with the call."""

    function = staticmethod(pooled_distill_loss)

    def forward(self, *tensors: Any, **keywords: Any) -> RegionLosses:
        return pooled_distill_loss(*tensors, **{**self.options, **keywords})


class HeadDistillLoss(_Loss):
    """:func:`tardkd.ops.head_distill_loss` with any of its keyword arguments bound; the others go with the call."""

    function = staticmethod(head_distill_loss)

    def forward(self, *tensors: Any, **keywords: Any) -> RegionLosses:
        return head_distill_loss(*tensors, **{**self.options, **keywords})


class GaussianFeatureLoss(_Loss):
    """:func:`tardkd.ops.gaussian_feature_loss` with any of its keyword arguments bound; the others go with the call."""

    function = staticmethod(gaussian_feature_loss)

    def forward(self, *tensors: Any, **keywords: Any) -> Tensor:
        return gaussian_feature_loss(*tensors, **{**self.options, **keywords})


class DistributionDistillLoss(_Loss):
    """:func:`tardkd.ops.distribution_distill_loss` with keyword arguments bound; the others go with the call."""

    function = staticmethod(distribution_distill_loss)

    def forward(self, *tensors: Any, **keywords: Any) -> Tensor:
        return distribution_distill_loss(*tensors, **{**self.options, **keywords})
