"""What the autograd functions of the fused losses share.

A scalar loss computes its gradients in the forward pass, for an upstream gradient of one, in the accumulation dtype;
the backward pass has only to multiply. (Half-precision gradients are rounded after that multiplication: before it, a
gradient meant for a loss scaled by 65536 would underflow.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# True while a backward pass runs that keeps the graph. Absent from a future torch: taken as always true.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def wanted(*tensors: Tensor) -> bool:
    """Whether autograd will ask for the gradient of any of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def scale_gradients(
    gradients: Sequence[Tensor], upstream: Tensor | None, inputs_dtypes: Sequence[torch.dtype]
) -> list[Tensor | None]:
    """Gradients for an upstream gradient of one times the actual one, in the inputs' dtypes.

    In place where nothing can ask for the saved gradients again: a gradient pyramid is the largest tensor of a
    training step, and a scaled copy would double it.
    """
    if upstream is None:
        return [None] * len(inputs_dtypes)
    in_place = not torch.compiler.is_compiling() and not _graph_is_kept()
    scaled = [gradient.mul_(upstream) if in_place else gradient * upstream for gradient in gradients]
    return [gradient.to(dtype) for gradient, dtype in zip(scaled, inputs_dtypes)]
