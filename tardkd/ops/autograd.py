"""Gradients of the registered ops: what is kept from the forward pass, and what the backward pass makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gradients import once_differentiable, refuse_transforms, rounded, scaled_like, wanted
from .inputs import (
    NO_GRADIENTS,
    AlignBackward,
    AlignCall,
    DistributionBackward,
    DistributionCall,
    GaussianBackward,
    GaussianCall,
    RegionBackward,
    RegionCall,
    RegionLosses,
    RegionResults,
    Wants,
)
from .maps import Layout, layout_of, maps_of
from .registry import kernels_of, needs_dispatch
from .spec import RoIAlignSpec

# --- losses over shared regions ---------------------------------------------------------------------------------------


def region_losses(call: RegionCall) -> RegionLosses:
    """The losses of a call, part of the graph where a gradient is wanted."""
    refuse_transforms(call)
    if call.loss.feature_norm == "channel":
        with torch.no_grad():  # the gradient through what standardises the features is made with that of the features
            norms_of = torch.ops.tardkd.channel_norms
            call = call.with_norms(norms_of(call.student_features), norms_of(call.teacher_features))
    inputs = call.inputs
    wants = Wants(wanted(*call.student_features), wanted(inputs.student_logits), wanted(inputs.student_deltas))
    if not any(wants):
        return run_regions(call, NO_GRADIENTS).losses()
    kernels = kernels_of(inputs.proposals.device)
    if call.tap is not None and wants.features and kernels.adds(call) and (scalar := call.tap.take(call)) is not None:
        wants = wants._replace(features=False)
        return RegionLosses(*_RegionLoss.apply(call.without_tensors(), wants, scalar, *call.tensors()))
    # The gradient of a pyramid sums over regions, so that with "none" it must know what each of them is worth.
    if call.loss.reduction == "none" or kernels.defers(call):
        return RegionLosses(*_DeferredRegionLoss.apply(call.without_tensors(), wants, *call.tensors()))
    return RegionLosses(*_RegionLoss.apply(call.without_tensors(), wants, None, *call.tensors()))


def run_regions(call: RegionCall, wants: Wants, upstream: Tensor | None = None) -> RegionResults:
    """The registered op, or just its kernels; ``upstream`` (3, R): gradients of every region's terms."""
    device = call.inputs.proposals.device
    if needs_dispatch(device, call.tensors()):
        return RegionResults(*getattr(torch.ops.tardkd, call.op)(*call.pack(wants, upstream)))
    run = getattr(kernels_of(device), call.op)
    if not torch.is_grad_enabled():  # as ever within a function of autograd
        return run(call, wants, upstream)
    with torch.no_grad():
        return run(call, wants, upstream)


def scale_gradients(
    results: list[Tensor], gradients: list[Tensor], factors: Tensor, upstream: list[Tensor], terms: list[int]
) -> None:
    """The registered op, or just its kernel; see :class:`tardkd.ops.kernels.Kernels`."""
    if needs_dispatch(factors.device, (factors, *gradients, *upstream)):
        torch.ops.tardkd.scale_gradients(results, gradients, factors, upstream, terms)
    else:
        kernels_of(factors.device).scale_gradients(results, gradients, factors, upstream, terms)


def _to_pixels(call: RegionCall, grad_pooled: Tensor, gates: Tensor, factor: Tensor | None) -> Tensor:
    """The features' gradient, flat, times ``factor`` (), of what ``region_distill`` has left: see RegionBackward."""
    packed = RegionBackward.of(call, grad_pooled, gates, factor).pack()
    device = call.inputs.proposals.device
    if needs_dispatch(device, (grad_pooled, *call.tensors())):
        return torch.ops.tardkd.region_distill_backward(*packed)
    return kernels_of(device).region_distill_backward(*packed)


class _Student(NamedTuple):
    """What a backward pass has to know of the student's tensors: dtypes, and where a pyramid's gradient is to lie."""

    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]  # of features, logits and deltas
    layout: Layout | None  # None: at most pooled features, of which the gradient is one tensor

    @classmethod
    def of(cls, call: RegionCall) -> _Student:
        layout = None if call.pooling is None else layout_of(call.student_features)
        logits, deltas = call.inputs.student_logits, call.inputs.student_deltas
        [features] = call.student_features[:1] or [logits]  # without features nobody asks for their gradient
        return cls((features.dtype, logits.dtype, deltas.dtype), layout)


def _input_gradients(
    settings: RegionCall, student: _Student, features: Tensor | None, logits: Tensor | None, deltas: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of the call's tensors: None for all but the student's."""
    maps: Sequence[Tensor | None] = [None] * len(settings.student_features)
    if features is not None:
        maps = [features] if student.layout is None else maps_of(features, *student.layout)
    return settings.gradients(maps, logits, deltas)


class _RegionLoss(torch.autograd.Function):
    """Gradients in the forward pass, for the scalar reductions, where the device prefers that.

    ``scalar``, (), is a tap's, which makes the features' gradient in the backward pass: see ``tap.py``.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: RegionCall, wants: Wants, scalar: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        call = settings.with_tensors(tensors)
        ctx.settings, ctx.wants, ctx.student = settings, wants, _Student.of(call)
        ctx.is_tapped = scalar is not None
        ctx.leaves_pixels = wants.features and kernels_of(call.inputs.proposals.device).leaves_pixels(call)
        results = run_regions(call, wants)
        # The student's tensors are saved for once_differentiable, which must know what the gradients were made of. The
        # tap reads all of them once more: saved, they cannot change unnoticed.
        student = (*call.student_features, call.inputs.student_logits, call.inputs.student_deltas)
        regions = (results.gates, call.inputs.proposals, call.inputs.student_levels)
        of_gradients = (results.factors, *results.gradients(), *regions)
        ctx.save_for_backward(*of_gradients, *(tensors if ctx.is_tapped else student))
        ctx.mark_non_differentiable(results.gates, results.scores)
        ctx.set_materialize_grads(False)
        return tuple(results.losses())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        factors, *saved = ctx.saved_tensors
        of_term = {term: gradient for term, gradient in enumerate(upstream[:3]) if gradient is not None}
        terms = [term for term in of_term if ctx.wants[term] and not (term == 0 and ctx.leaves_pixels)]
        results = [scaled_like(saved[term], ctx.student.dtypes[term]) for term in terms]
        gradients, given = [saved[term] for term in terms], [of_term[term] for term in terms]
        factor = None
        if (ctx.is_tapped or ctx.leaves_pixels) and 0 in of_term:  # what is made yet is multiplied by it
            factor = torch.empty_like(of_term[0])
            results.append(factor)
            gradients.append(factors[0])
            given.append(of_term[0])
            terms.append(-1)
        scale_gradients(results, gradients, factors, given, terms)
        scaled: list[Tensor | None] = [None, None, None]
        for term, result in zip(terms, results):
            if term >= 0:
                scaled[term] = rounded(result, ctx.student.dtypes[term])
        if ctx.leaves_pixels and factor is not None:
            gates, proposals, levels, *student = saved[3:]
            inputs = ctx.settings.inputs._replace(proposals=proposals, student_levels=levels)
            features = student[: len(ctx.settings.student_features)]
            call = ctx.settings._replace(student_features=features, inputs=inputs)
            scaled[0], factor = _to_pixels(call, saved[0], gates, factor), None
        return None, None, factor, *_input_gradients(ctx.settings, ctx.student, *scaled)


class _DeferredRegionLoss(torch.autograd.Function):
    """Gradients in the backward pass: the op runs again, with the upstream gradient of every region's terms."""

    @staticmethod
    def forward(ctx: Any, settings: RegionCall, wants: Wants, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.settings, ctx.wants = settings, wants
        results = run_regions(settings.with_tensors(tensors), NO_GRADIENTS)
        ctx.save_for_backward(results.factors, *tensors)
        ctx.mark_non_differentiable(results.gates, results.scores)
        ctx.set_materialize_grads(False)
        return tuple(results.losses())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        factors, *tensors = ctx.saved_tensors
        call, terms = ctx.settings.with_tensors(tensors), upstream[:3]
        student = _Student.of(call)
        wants = Wants(*(want and gradient is not None for want, gradient in zip(ctx.wants, terms)))
        gradients: list[Tensor | None] = [None, None, None]
        if any(wants):
            given = next(gradient for gradient in terms if gradient is not None)
            all_given = [given if gradient is None else gradient for gradient in terms]
            if call.loss.reduction == "none":
                per_region = torch.stack(all_given)
            else:
                products = torch.empty_like(factors)
                scale_gradients(list(products.unbind()), list(factors.unbind()), factors, all_given, [-1, -1, -1])
                per_region = products.view(3, 1).expand(3, call.inputs.proposals.shape[0])
                call = call.unreduced()
            results = run_regions(call, wants, per_region)
            if wants.features and kernels_of(call.inputs.proposals.device).leaves_pixels(call):
                results = results._replace(grad_features=_to_pixels(call, results.grad_features, results.gates, None))
            gradients = [
                rounded(gradient, dtype) if want else None
                for want, gradient, dtype in zip(wants, results.gradients(), student.dtypes)
            ]
        return None, None, *_input_gradients(ctx.settings, student, *gradients)


# --- RoIAlign ---------------------------------------------------------------------------------------------------------


def roi_align(call: AlignCall) -> Tensor:
    """(R, C, p_h, p_w), part of the graph where the features' gradient is wanted."""
    refuse_transforms(call)
    if wanted(*call.features):
        return _RoIAlign.apply(call.scales, call.align, call.proposals, call.levels, *call.features)
    return torch.ops.tardkd.roi_align(*call.pack())


class _RoIAlign(torch.autograd.Function):
    """Keeps only the regions: the gradient does not depend on the features."""

    @staticmethod
    def forward(
        ctx: Any,
        scales: list[float],
        align: RoIAlignSpec,
        proposals: Tensor,
        levels: Tensor | None,
        *features: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(proposals, levels)
        ctx.scales, ctx.align, ctx.layout = scales, align, layout_of(features)
        return torch.ops.tardkd.roi_align(*AlignCall(list(features), proposals, levels, scales, align).pack())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_pooled: Tensor) -> tuple[Tensor | None, ...]:
        proposals, levels = ctx.saved_tensors
        backward = AlignBackward(grad_pooled, proposals, levels, ctx.layout, ctx.scales, ctx.align)
        maps = maps_of(torch.ops.tardkd.roi_align_backward(*backward.pack()), *ctx.layout)
        return None, None, None, None, *maps


# --- Gaussian-mask loss -----------------------------------------------------------------------------------------------


def gaussian_loss(call: GaussianCall) -> Tensor:
    """The loss () of a call."""
    refuse_transforms(call)
    return _GaussianLoss.apply(call.without_tensors(), *call.tensors())


class _GaussianLoss(torch.autograd.Function):
    """The gradient is made in the backward pass, from the inputs.

    To make it with the loss and scale it later takes longer, and would keep a pyramid in between.
    """

    @staticmethod
    def forward(ctx: Any, settings: GaussianCall, *tensors: Tensor) -> Tensor:
        loss, mask_sums = torch.ops.tardkd.gaussian_feature_loss(*settings.with_tensors(tensors).pack())
        ctx.save_for_backward(mask_sums, *tensors)
        ctx.settings = settings
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        mask_sums, *tensors = ctx.saved_tensors
        backward = GaussianBackward(ctx.settings.with_tensors(tensors), mask_sums, upstream)
        gradients = torch.ops.tardkd.gaussian_feature_loss_backward(*backward.pack())
        return None, *ctx.settings._replace(student_features=gradients).tensors()


# --- distributions of boxes' sides ------------------------------------------------------------------------------------


def distribution_loss(call: DistributionCall) -> Tensor:
    """The loss of a call, () or (R,)."""
    refuse_transforms(call)
    return _DistributionLoss.apply(call.without_tensors(), *call.tensors())


class _DistributionLoss(torch.autograd.Function):
    """The gradient is made in the backward pass, from the inputs: one reading of few logits, and nothing to keep."""

    @staticmethod
    def forward(ctx: Any, settings: DistributionCall, *tensors: Tensor | None) -> Tensor:
        loss, factor = torch.ops.tardkd.distribution_distill_loss(*settings.with_tensors(tensors))
        ctx.save_for_backward(factor, *tensors)
        ctx.settings = settings
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        factor, *tensors = ctx.saved_tensors
        call = ctx.settings.with_tensors(tensors)
        if call.reduction != "none":
            upstream = (upstream * factor).expand(call.gates.shape[0])
        gradient = torch.ops.tardkd.distribution_distill_loss_backward(*DistributionBackward(call, upstream).pack())
        return None, gradient, None, None, None
