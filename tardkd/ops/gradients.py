"""What the autograd functions of the fused losses share.

A scalar loss may compute its gradients in the forward pass, for an upstream gradient of one, in the accumulation
dtype; then the backward pass has only to multiply. (Half-precision gradients are rounded after that multiplication:
before it, a gradient meant for a loss scaled by 65536 would underflow.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .inputs import AlignCall, DistributionCall, GaussianCall, RegionCall

# True while a backward pass runs that keeps the graph. Absent from a future torch: taken as always true.
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def wanted(*tensors: Tensor) -> bool:
    """Whether autograd will ask for the gradient of any of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def scaled_like(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a gradient for an upstream gradient of one is to be multiplied by the actual one.

    In place where nothing can ask for the saved gradient again: a gradient pyramid is the largest tensor of a
    training step, and a scaled copy would double it. On a GPU it is rounded to ``dtype``, the input's, in the same
    pass, which takes a CPU two.
    """
    if gradient.is_cuda and dtype != gradient.dtype:
        return torch.empty_like(gradient, dtype=dtype)
    return torch.empty_like(gradient) if torch.compiler.is_compiling() or graph_is_kept() else gradient


def rounded(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """In the input's dtype; to ask first takes a fraction of a conversion's time."""
    return gradient if gradient.dtype == dtype else gradient.to(dtype)


def once_differentiable(backward: Callable) -> Callable:
    """For a ``backward`` whose result must not be differentiated again.

    torch's decorator of that name lets a second derivative pass as zero where the upstream gradient is a constant,
    as it is for a loss. This one refuses whenever a second derivative is asked for: the result hangs on everything that
    it was made of, on the upstream gradients and the saved tensors, so that whoever asks for the derivative with
    respect to any of them comes by.
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # grad is enabled with create_graph=True
            return backward(ctx, *upstream)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        anchor = torch.zeros((), requires_grad=True)  # where nothing else needs a gradient
        origins = [anchor, *(origin for origin in (*upstream, *ctx.saved_tensors) if origin is not None)]
        given = [gradient for gradient in gradients if gradient is not None]
        guarded = iter(_RefuseDerivative.apply(len(origins), *origins, *given))
        return tuple(None if gradient is None else next(guarded) for gradient in gradients)

    return refusing


class _RefuseDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, origins: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.clone() for gradient in tensors[origins:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("cannot differentiate twice through tardkd.ops: their gradients are not a graph")


def refuse_transforms(call: RegionCall | AlignCall | GaussianCall | DistributionCall) -> None:
    """Refuse derivatives that come along with the forward pass, and what rewrites it: the kernels know neither.

    torch would take such a derivative for zero without a word, since the registered ops have no rule for it.

    Raises:
        RuntimeError: one of the call's tensors carries a tangent, or belongs to a transform of torch.func.
    """
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if torch.compiler.is_compiling() or not (transformed or forward_ad._current_level >= 0):
        return
    if any(tensor is not None and _is_transformed(tensor) for tensor in call.tensors()):
        raise RuntimeError(
            "tardkd.ops have gradients for backward() and torch.autograd.grad alone, none for forward mode or the "
            "transforms of torch.func (jvp, grad, vmap and others); tardkd.ops.reference has them"
        )


def _is_transformed(tensor: Tensor) -> bool:
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        return True
    functorch = torch._C._functorch  # a constant under a transform may be wrapped too, but needs no derivative
    is_wrapped = functorch.is_functorch_wrapped_tensor(tensor)
    return is_wrapped and (tensor.requires_grad or functorch.is_batchedtensor(tensor))
