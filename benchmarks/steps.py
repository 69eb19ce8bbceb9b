"""One side's work: forward, and backward into leaves. What is compared and what is timed is the same step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from tolerances import TOLERANCES
from torch import Tensor
from workloads import Workload

# Rivals place samples in float32 and round in between, tardkd does neither: this many times the table's tolerance.
SLACK = 10


@dataclass(frozen=True)
class Step:
    """``forward`` gives the results, ``upstream`` their gradients, which reach the ``leaves``.

    Runs under autocast in half precision, as training does.
    """

    forward: Callable[[Workload], Sequence[Tensor]]
    leaves: Callable[[Workload], Sequence[Tensor]]
    upstream: Callable[[Workload], Sequence[Tensor]]

    def clear(self, workload: Workload) -> None:
        for leaf in self.leaves(workload):
            leaf.grad = None

    def and_clear(self, workload: Workload) -> None:
        """What is timed: the step, until its gradients are gone as well. To free a pyramid takes time, too."""
        self(workload)
        self.clear(workload)

    def __call__(self, workload: Workload) -> list[Tensor]:
        self.clear(workload)
        like = workload.student_logits
        with torch.autocast(like.device.type, like.dtype, enabled=like.dtype != torch.float32):
            results = list(self.forward(workload))
        torch.autograd.backward(results, self.upstream(workload)[: len(results)])
        return results


def of_losses(forward: Callable[[Workload], Sequence[Tensor]], leaves: Callable = lambda w: w.leaves) -> Step:
    """A step of up to three scalar losses, with upstream gradients other than one, as weighted losses have them."""
    return Step(forward, leaves, lambda w: loss_weights(w.labels.device, w.student_logits.dtype))


@lru_cache
def loss_weights(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """In float16 large, as a gradient scaler makes them."""
    scale = 2.0**12 if dtype == torch.float16 else 1.0
    return [torch.tensor(weight * scale, device=device) for weight in (0.5, 0.25, 0.125)]


def assert_agree(ours: Step, theirs: Step, workload: Workload) -> None:
    """The same results and the same gradients; leaves are compared from the last on, as far as both sides have them."""
    found = []
    for step in (ours, theirs):
        results = [result.detach() for result in step(workload)]
        leaves = list(step.leaves(workload))
        found.append((results, leaves, [leaf.grad for leaf in leaves]))
    (results, leaves, gradients), (their_results, their_leaves, their_gradients) = found
    dtype = leaves[0].dtype
    for actual, expected in zip(results, their_results, strict=True):
        assert_close(actual, expected, dtype)
    for leaf, actual, their_leaf, expected in zip(*map(reversed, (leaves, gradients, their_leaves, their_gradients))):
        if leaf is not their_leaf:
            break
        assert_close(actual, expected, dtype)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Relative to the largest value, and relative L2 distance."""
    tolerance = TOLERANCES[dtype]
    assert actual.shape == expected.shape and actual.isfinite().all() and expected.isfinite().all()
    actual, expected = actual.double(), expected.double()
    error, largest = actual - expected, expected.abs().max()
    assert error.abs().max() <= SLACK * (tolerance.stored * largest + tolerance.tiny), (error.abs().max(), largest)
    norm = SLACK * (tolerance.stored * expected.norm() + tolerance.tiny * expected.numel() ** 0.5)
    assert error.norm() <= norm, (error.norm(), expected.norm())
