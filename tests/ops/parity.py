"""Hold an op of a back end against the reference in float64: values, gates, scores and gradients."""

from __future__ import annotations

import torch
from tolerances import assert_tensors_close, assert_values_close
from torch import Tensor

from tardkd.ops import reference

from .scenes import LEVEL_RULE, Scene

TERMS = ("feature", "classification", "regression")
UPSTREAM = (0.7, -1.3, 2.1)  # of the three losses; different, so that a mixed-up term shows


def losses_and_gradients(
    ops, scene: Scene, *, pooled: tuple[Tensor, Tensor] | None = None, heads_alone: bool = False, **options
):
    """Of ``region_distill_loss``; given pooled features, of ``pooled_distill_loss``; or of ``head_distill_loss``."""
    if heads_alone:
        losses = ops.head_distill_loss(*scene.per_region, **options)
        leaves = [scene.student_logits, scene.student_deltas]
    elif pooled is None:
        losses = ops.region_distill_loss(*scene.inputs, **{**scene.scales, **LEVEL_RULE, **options})
        leaves = scene.leaves
    else:
        losses = ops.pooled_distill_loss(*pooled, *scene.per_region, **options)
        leaves = [pooled[0], scene.student_logits, scene.student_deltas]
    total = sum(weight * upstream_sum(loss) for weight, loss in zip(UPSTREAM, losses[:3]))
    return losses, torch.autograd.grad(total, leaves)


def upstream_sum(loss: Tensor) -> Tensor:
    """A scalar from a loss; the regions of ``reduction="none"`` each get a weight of their own."""
    if loss.dim() == 0:
        return loss
    weights = torch.linspace(0.5, 2, len(loss), dtype=torch.float64)
    weights[::2] *= -1
    return (loss * weights.to(loss)).sum()


def assert_losses_match(
    ops, scene: Scene, *, pooled: tuple[Tensor, Tensor] | None = None, heads_alone: bool = False, **options
) -> None:
    """``scene`` is in the dtype and layout under test."""
    expected_pooled = None
    if pooled is not None:
        expected_pooled = (pooled[0].detach().double().requires_grad_(), pooled[1].double())
    options["heads_alone"] = heads_alone
    losses, gradients = losses_and_gradients(ops, scene, pooled=pooled, **options)
    expected, expected_gradients = losses_and_gradients(reference, scene.doubled(), pooled=expected_pooled, **options)

    dtype = (scene.student_features[0] if pooled is None else pooled[0]).dtype
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    assert losses.gates.dtype == torch.bool
    assert losses.gates.tolist() == expected.gates.tolist()
    assert losses.scores.dtype == accumulation
    assert_values_close(losses.scores, expected.scores, dtype, "scores")
    for term in TERMS:
        assert getattr(losses, term).dtype == accumulation
        assert_values_close(getattr(losses, term), getattr(expected, term), dtype, f"{term} loss")

    features = len(gradients) - 2
    names = [f"gradient of student_features[{level}]" for level in range(features)]
    names += ["gradient of student_logits", "gradient of student_deltas"]
    for name, gradient, target in zip(names, gradients, expected_gradients):
        assert_tensors_close(gradient, target, dtype, name)
