"""What the autograd functions of the fused losses share.

A scalar loss may compute its gradients in the forward pass, for an upstream gradient of one, in the accumulation
dtype; then the backward pass has only to multiply. (Half-precision gradients are rounded after that multiplication:
before it, a gradient meant for a loss scaled by 65536 would underflow.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

# True while a backward pass runs that keeps the graph. Absent from a future torch: taken as always true.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def wanted(*tensors: Tensor) -> bool:
    """Whether autograd will ask for the gradient of any of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def scale_gradient(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient for an upstream gradient of one times the actual one, in the input's dtype.

    In place where nothing can ask for the saved gradient again: a gradient pyramid is the largest tensor of a
    training step, and a scaled copy would double it.
    """
    if torch.compiler.is_compiling():
        return (gradient * upstream).to(dtype)
    if gradient.is_cuda and dtype != gradient.dtype:  # multiplied and rounded in one pass, which takes the CPU two
        return torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))
    return (gradient * upstream if _graph_is_kept() else gradient.mul_(upstream)).to(dtype)


def once_differentiable(backward: Callable) -> Callable:
    """For a ``backward`` whose result must not be differentiated again.

    torch's decorator of that name lets a second derivative pass as zero where the upstream gradient is a constant,
    as it is for a loss. This one refuses whenever a second derivative is asked for.
    """

    @functools.wraps(backward)
    def refusing(ctx, *upstream):
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # grad is enabled with create_graph=True
            return gradients
        given = [gradient for gradient in gradients if gradient is not None]
        guarded = iter(_RefuseDerivative.apply(torch.zeros((), requires_grad=True), *given))
        return tuple(None if gradient is None else next(guarded) for gradient in gradients)

    return refusing


class _RefuseDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, _anchor, *gradients):
        return tuple(gradient.clone() for gradient in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("cannot differentiate twice through tardkd.ops: their gradients are not a graph")
