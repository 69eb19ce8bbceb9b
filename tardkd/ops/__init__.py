"""Functional API and modules. Each function has its plain-PyTorch twin in :mod:`tardkd.ops.reference`."""

from . import registry as _registry  # noqa: F401  (registers torch.ops.tardkd)
from .gaussian import gaussian_feature_loss
from .memory import empty_cache
from .modules import GaussianFeatureLoss, MultiScaleRoIAlign, PooledDistillLoss, RegionDistillLoss
from .region import pooled_distill_loss, region_distill_loss
from .roi_align import multiscale_roi_align, shared_roi_align
from .types import RegionLosses

__all__ = [
    "GaussianFeatureLoss",
    "MultiScaleRoIAlign",
    "PooledDistillLoss",
    "RegionDistillLoss",
    "RegionLosses",
    "empty_cache",
    "gaussian_feature_loss",
    "multiscale_roi_align",
    "pooled_distill_loss",
    "region_distill_loss",
    "shared_roi_align",
]
