"""Functional API and modules. Each function has its plain-PyTorch twin in :mod:`tardkd.ops.reference`."""

from .functional import (
    gaussian_feature_loss,
    head_distill_loss,
    multiscale_roi_align,
    pooled_distill_loss,
    region_distill_loss,
    shared_roi_align,
)
from .inputs import RegionLosses
from .memory import empty_cache
from .modules import GaussianFeatureLoss, HeadDistillLoss, MultiScaleRoIAlign, PooledDistillLoss, RegionDistillLoss

__all__ = [
    "GaussianFeatureLoss",
    "HeadDistillLoss",
    "MultiScaleRoIAlign",
    "PooledDistillLoss",
    "RegionDistillLoss",
    "RegionLosses",
    "empty_cache",
    "gaussian_feature_loss",
    "head_distill_loss",
    "multiscale_roi_align",
    "pooled_distill_loss",
    "region_distill_loss",
    "shared_roi_align",
]
