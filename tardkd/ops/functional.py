"""The public functions: a call, once checked, is served by the kernels of its device, or else by the reference."""

from __future__ import annotations

from torch import Tensor

from . import autograd, distribution, gaussian, reference, region, roi_align
from .fallback import has_kernels
from .inputs import AlignCall, DistributionCall, GaussianCall, RegionCall, RegionLosses
from .signature import function_of


def run_region_losses(call: RegionCall) -> RegionLosses:
    return (autograd if has_kernels(call.inputs.proposals.device) else reference).region_losses(call)


def run_roi_align(call: AlignCall) -> Tensor:
    return (autograd if has_kernels(call.proposals.device) else reference).roi_align(call)


def run_shared_roi_align(calls: tuple[AlignCall, AlignCall]) -> tuple[Tensor, Tensor]:
    student, teacher = calls
    return run_roi_align(student), run_roi_align(teacher)


def run_gaussian_loss(call: GaussianCall) -> Tensor:
    return (autograd if has_kernels(call.gt_boxes.device) else reference).gaussian_loss(call)


def run_distribution_loss(call: DistributionCall) -> Tensor:
    return (autograd if has_kernels(call.gates.device) else reference).distribution_loss(call)


region_distill_loss = function_of(region.region_distill_loss, run_region_losses, "tardkd.ops")
pooled_distill_loss = function_of(region.pooled_distill_loss, run_region_losses, "tardkd.ops")
head_distill_loss = function_of(region.head_distill_loss, run_region_losses, "tardkd.ops")
multiscale_roi_align = function_of(roi_align.multiscale_roi_align, run_roi_align, "tardkd.ops")
shared_roi_align = function_of(roi_align.shared_roi_align, run_shared_roi_align, "tardkd.ops")
gaussian_feature_loss = function_of(gaussian.gaussian_feature_loss, run_gaussian_loss, "tardkd.ops")
distribution_distill_loss = function_of(distribution.distribution_distill_loss, run_distribution_loss, "tardkd.ops")
