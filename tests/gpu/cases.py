"""Forward and backward of every op on inputs made beforehand: a step launches kernels and does nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from ops.parity import UPSTREAM
from ops.scenes import LEVEL_RULE, Scene, make_scene
from ops.test_distribution import make_inputs
from ops.test_pooled_loss import make_pooled
from tolerances import assert_tensors_close, assert_values_close
from torch import Tensor

import tardkd.ops
from tardkd.ops.checks import accumulation_dtype


@dataclass
class Case:
    """A scene and whatever else the ops take."""

    scene: Scene
    pooled: list[Tensor]  # student's and teacher's
    distributions: list[Tensor]  # of boxes' sides, student's and teacher's
    others: list[Tensor]  # a teacher's maps of the student's shapes
    gt_boxes: list[Tensor]  # one an image
    loss_upstream: list[Tensor]  # of the three losses
    region_upstream: list[Tensor]  # of the three unreduced losses
    pooled_upstream: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        scene = self.scene
        inputs = [*scene.student_features, *scene.teacher_features, *scene.per_region, scene.region_weights]
        upstream = [*self.loss_upstream, *self.region_upstream, self.pooled_upstream]
        return [*inputs, *self.pooled, *self.distributions, *self.others, *self.gt_boxes, *upstream]

    @torch.no_grad()
    def copy_(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values):
            tensor.copy_(value)

    def wide(self) -> Case:
        """The same numbers in float64 and on the CPU, whose kernels give the expected values."""

        def widen(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor.detach().double().cpu().requires_grad_(tensor.requires_grad) for tensor in tensors]

        return Case(
            self.scene.to(torch.float64, device="cpu"),
            widen(self.pooled),
            widen(self.distributions),
            widen(self.others),
            [boxes.cpu() for boxes in self.gt_boxes],
            widen(self.loss_upstream),
            widen(self.region_upstream),
            widen([self.pooled_upstream])[0],
        )


def make_case(
    seed: int = 0,
    student: torch.dtype = torch.float32,
    teacher: torch.dtype | None = None,
    layout: str = "nchw",
    device: str = "cuda",
    **scene_options: object,
) -> Case:
    scene = make_scene(seed, **{"channels": 8, **scene_options}).to(student, teacher, layout, layout, device)
    generator = torch.Generator().manual_seed(seed)
    regions, images = len(scene.labels), scene.student_features[0].shape[0]

    def random(like: Tensor, dtype: torch.dtype) -> Tensor:
        values = torch.randn(like.shape, generator=generator)
        return torch.empty_like(like, dtype=dtype, requires_grad=False).copy_(values)

    pooled_layout = "nchw" if layout == "nchw" else "channels_last"
    pooled = make_pooled(scene, student, teacher or student, pooled_layout, channels=8)
    weights = torch.linspace(-1.5, 2, regions, dtype=accumulation_dtype(student)).to(device)
    return Case(
        scene=scene,
        pooled=list(pooled),
        distributions=list(make_inputs(seed, regions, 16, student, teacher, device=device)[:2]),
        others=[random(feature, teacher or student) for feature in scene.student_features],
        gt_boxes=[scene.gt_boxes[image::images].contiguous() for image in range(images)],
        loss_upstream=[weights.new_tensor(upstream) for upstream in UPSTREAM],
        region_upstream=[weights * upstream for upstream in UPSTREAM],
        pooled_upstream=torch.randn(
            (regions, scene.student_features[0].shape[1], 7, 7), generator=generator, dtype=torch.float32
        ).to(device, student),
    )


# --- steps ---------------------------------------------------------------------------------------------------------


class Forward(NamedTuple):
    results: list[Tensor]
    outputs: list[Tensor]  # those of the results that gradients flow back from
    upstream: list[Tensor]
    leaves: list[Tensor]

    def backward(self) -> list[Tensor]:
        return list(torch.autograd.grad(self.outputs, self.leaves, self.upstream))


class Outcome(NamedTuple):
    results: list[Tensor]
    gradients: list[Tensor]


def _of_losses(case: Case, losses: tardkd.ops.RegionLosses, leaves: list[Tensor]) -> Forward:
    upstream = case.region_upstream if losses.feature.dim() else case.loss_upstream
    return Forward(list(losses), list(losses[:3]), upstream, leaves)


def region(case: Case, **options: object) -> Forward:
    scene = case.scene
    options = {**scene.scales, **LEVEL_RULE, "region_weights": scene.region_weights, **options}
    return _of_losses(case, tardkd.ops.region_distill_loss(*scene.inputs, **options), scene.leaves)


def pooled(case: Case, **options: object) -> Forward:
    scene = case.scene
    options = {"region_weights": scene.region_weights, **options}
    losses = tardkd.ops.pooled_distill_loss(*case.pooled, *scene.per_region, **options)
    return _of_losses(case, losses, [case.pooled[0], scene.student_logits, scene.student_deltas])


def heads(case: Case, **options: object) -> Forward:
    scene = case.scene
    options = {"region_weights": scene.region_weights, **options}
    losses = tardkd.ops.head_distill_loss(*scene.per_region, **options)
    return _of_losses(case, losses, [scene.student_logits, scene.student_deltas])


def distribution(case: Case, **options: object) -> Forward:
    student, teacher = case.distributions
    options = {"region_weights": case.scene.region_weights, **options}
    loss = tardkd.ops.distribution_distill_loss(student, teacher, case.scene.labels > 0, **options)
    upstream = case.region_upstream if loss.dim() else case.loss_upstream
    return Forward([loss], [loss], upstream[2:], [student])


def align(case: Case) -> Forward:
    scene = case.scene
    features = tardkd.ops.multiscale_roi_align(
        scene.student_features, scene.proposals, scales=scene.student_scales, **LEVEL_RULE
    )
    return Forward([features], [features], [case.pooled_upstream], scene.student_features)


def gaussian(case: Case) -> Forward:
    scene = case.scene
    features = (scene.student_features, case.others)
    loss = tardkd.ops.gaussian_feature_loss(*features, case.gt_boxes, scales=scene.student_scales)
    return Forward([loss], [loss], case.loss_upstream[:1], scene.student_features)


STEPS: dict[str, Callable[[Case], Forward]] = {
    "region": region,
    "region-all": partial(region, feature_gate="all", bin_weight="gaussian"),
    "region-none": partial(region, reduction="none"),
    "pooled": pooled,
    "pooled-none": partial(pooled, reduction="none"),
    "heads": heads,
    "heads-none": partial(heads, reduction="none"),
    "distribution": distribution,
    "distribution-none": partial(distribution, reduction="none"),
    "align": align,
    "gaussian": gaussian,
}


def run(name: str, case: Case) -> Outcome:
    forward = STEPS[name](case)
    return Outcome(forward.results, forward.backward())


# --- comparing -----------------------------------------------------------------------------------------------------


def assert_identical(actual: Outcome, expected: Outcome) -> None:
    for kind, ours, theirs in zip(Outcome._fields, actual, expected):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(one, other), f"{kind}[{index}] differs in {int((one != other).sum())} elements"


def assert_matches(actual: Outcome, expected: Outcome, dtype: torch.dtype) -> None:
    """``expected`` in float64; ``dtype``: the student's."""
    for index, (one, other) in enumerate(zip(actual.results, expected.results, strict=True)):
        if other.dtype == torch.bool:
            assert one.tolist() == other.tolist()
        elif other.dim() == 4:
            assert_tensors_close(one, other, dtype, f"results[{index}]")
        else:
            assert_values_close(one, other, dtype, f"results[{index}]")
    for index, (one, other) in enumerate(zip(actual.gradients, expected.gradients, strict=True)):
        assert_tensors_close(one, other, dtype, f"gradients[{index}]")
