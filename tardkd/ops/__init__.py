"""Functional API and modules. Each function has its plain-PyTorch twin in :mod:`tardkd.ops.reference`."""

from .functional import (
    distribution_distill_loss,
    gaussian_feature_loss,
    head_distill_loss,
    multiscale_roi_align,
    pooled_distill_loss,
    region_distill_loss,
    shared_roi_align,
)
from .inputs import RegionLosses
from .memory import empty_cache
from .modules import (
    DistributionDistillLoss,
    GaussianFeatureLoss,
    HeadDistillLoss,
    MultiScaleRoIAlign,
    PooledDistillLoss,
    RegionDistillLoss,
)
from .tap import FeatureTap, tap_features

__all__ = [
    "DistributionDistillLoss",
    "FeatureTap",
    "GaussianFeatureLoss",
    "HeadDistillLoss",
    "MultiScaleRoIAlign",
    "PooledDistillLoss",
    "RegionDistillLoss",
    "RegionLosses",
    "distribution_distill_loss",
    "empty_cache",
    "gaussian_feature_loss",
    "head_distill_loss",
    "multiscale_roi_align",
    "pooled_distill_loss",
    "region_distill_loss",
    "shared_roi_align",
    "tap_features",
]
