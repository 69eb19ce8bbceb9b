"""Functional API. Each op has its plain-PyTorch twin in :mod:`tardkd.ops.reference`."""

from .reference import (
    RegionLosses,
    gaussian_feature_loss,
    multiscale_roi_align,
    pooled_distill_loss,
    region_distill_loss,
    shared_roi_align,
)

__all__ = [
    "RegionLosses",
    "gaussian_feature_loss",
    "multiscale_roi_align",
    "pooled_distill_loss",
    "region_distill_loss",
    "shared_roi_align",
]
