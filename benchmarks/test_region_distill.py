"""``region_distill_loss``, forward and backward, against torchvision's RoIAlign on both pyramids and PyTorch losses."""

from __future__ import annotations

import pytest
import rivals
import torch
import workloads

from tardkd import ops

SIDES = ("tardkd", "torchvision")


def losses(side: str, workload: workloads.Workload, gate: str) -> tuple[torch.Tensor, ...]:
    features = (workload.student_features, workload.teacher_features, workload.boxes)
    if side == "tardkd":
        scales = dict(student_scales=workloads.SCALES)
        return ops.region_distill_loss(*features, *workload.per_region, **scales, feature_gate=gate)[:3]
    rival = rivals.RegionDistill(len(workload.student_features), feature_gate=gate)
    return rival(*features, workload.image_shapes, *workload.per_region)


def step(side: str, workload: workloads.Workload, gate: str) -> None:
    """One forward and backward, with upstream gradients other than one, as weighted losses have them."""
    for leaf in workload.leaves:
        leaf.grad = None
    feature, classification, regression = losses(side, workload, gate)
    (0.5 * feature + 0.25 * classification + 0.125 * regression).backward()


@pytest.mark.parametrize("gate", rivals.FEATURE_GATES)
def test_both_sides_agree(coco: workloads.Workload, gate: str) -> None:
    gradients = []
    for side in SIDES:
        step(side, coco, gate)
        gradients.append([leaf.grad for leaf in coco.leaves])
    torch.testing.assert_close(losses("tardkd", coco, gate), losses("torchvision", coco, gate), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(*gradients):
        # torchvision places samples in float32, tardkd in float64: some 1e-5 of a pixel apart.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("gate", rivals.FEATURE_GATES)
def test_forward_and_backward(benchmark, coco: workloads.Workload, gate: str, side: str, quick: bool) -> None:
    benchmark.group = f"region_distill_loss, forward + backward, feature gate {gate}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.pedantic(step, args=(side, coco, gate), rounds=1 if quick else 5, warmup_rounds=1)
