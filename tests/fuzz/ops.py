"""The ops with inputs as bad as they come, against the reference."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from tolerances import TOLERANCES
from torch import Tensor

import tardkd.ops
from tardkd.ops import reference
from tardkd.ops.spec import CHOICES
from tests.ops.scenes import GEOMETRIES, LAYOUTS, LEVEL_RULE, Scene, make_boxes, make_scene

from .cases import Finding, Target

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
STRANGE = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-300, 1e-45, 3e38, -3e38, 1e39, 1e154, 1e300, -1e300, 65504.0)
WRONG = (None, -1, 0, 2**31, 2**40, 7.5, math.nan, math.inf, "x", (), (1, 2, 3), [0.0], b"", True)
Run = Callable[[Any, dict[str, Any]], list[Tensor]]  # (tardkd.ops or its reference, options) -> results
OF_FEATURES = ("feature_loss", "feature_norm", "feature_gate", "bin_weight")  # options that the heads alone have not
FORMS = ("agnostic", "specific", "specific+background")
CALLS = 12  # of an op with the tensors of one case, which take longer to make
COMPARED = 12  # one call in so many is held against the reference, which takes longer than the kernels


def region_cases(rng: random.Random) -> Iterator[str]:
    """A region loss and its gradients."""
    scene = random_scene(rng)
    form = rng.choice(["pyramids", "pyramids", "pooled", "heads"])
    features = {
        "pyramids": (*scene.student_features, *scene.teacher_features),
        "pooled": random_pooled(rng, scene),
        "heads": (),
    }[form]
    given = random_rows(rng, scene, form)
    finite = are_finite(*scene.heads, *features, *(values for name, values in given.items() if "scores" in name))
    of_pyramids = ["output_size", "sampling_ratio", "canonical_level", "student_scales"] if form == "pyramids" else []
    for _ in range(CALLS):

        def run(ops: Any, options: dict[str, Any]) -> list[Tensor]:
            return run_regions(ops, scene, options, features if form != "pyramids" else None)

        options = {
            name: value for name, value in random_options(rng).items() if form != "heads" or name not in OF_FEATURES
        }
        yield try_call(rng, run, {**options, **given}, of_pyramids, scene, finite=finite)


def distribution_cases(rng: random.Random) -> Iterator[str]:
    """The loss of boxes' distributions and its gradient."""
    rows, bins = rng.choice([0, 1, 5, 17]), rng.choice([2, 16, 33])
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    student, teacher = (4 * torch.randn(2, rows, 4, bins, generator=generator)).to(rng.choice(DTYPES))
    gates = torch.rand(rows, generator=generator) < 0.5
    weights = torch.rand(rows, generator=generator) if rng.random() < 0.5 else None
    for side in (student, teacher):
        if rng.random() < 0.2:
            spoil(rng, side)
    finite = are_finite(student, teacher)
    student = student.requires_grad_()

    def run(ops: Any, options: dict[str, Any]) -> list[Tensor]:
        loss = ops.distribution_distill_loss(student, teacher, gates, **options)
        return [loss, *torch.autograd.grad(loss.sum(), student)]

    for _ in range(CALLS):
        options = dict(temperature=rng.choice([0.5, 1.0, 10.0]), reduction=rng.choice(CHOICES["reduction"]))
        yield try_call(rng, run, {**options, "region_weights": weights}, [], None, finite=finite)


def align_cases(rng: random.Random) -> Iterator[str]:
    """RoIAlign and its gradient."""
    scene = random_scene(rng)
    finite = are_finite(*scene.student_features)

    def run(ops: Any, options: dict[str, Any]) -> list[Tensor]:
        pooled = ops.multiscale_roi_align(scene.student_features, scene.proposals, **options)
        upstream = torch.linspace(-1, 1, pooled.numel()).view_as(pooled).to(pooled)
        return [pooled, *torch.autograd.grad(pooled, scene.student_features, upstream)]

    for _ in range(CALLS):
        options = dict(LEVEL_RULE, scales=scene.student_scales, output_size=rng.choice([1, 2, 7, (3, 5), 14]))
        options |= dict(sampling_ratio=rng.choice([0, 1, 2, 4]), aligned=rng.random() < 0.5)
        yield try_call(rng, run, options, [], scene, finite=finite)


def gaussian_cases(rng: random.Random) -> Iterator[str]:
    """The Gaussian-mask loss and its gradient."""
    scene = random_scene(rng)
    others = [torch.randn_like(f) for f in scene.student_features]
    finite = are_finite(*scene.student_features)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    gt_boxes = [make_boxes(generator, rng.randrange(12)) for _ in range(len(scene.student_features[0]))]
    for boxes in gt_boxes:
        spoil(rng, boxes)

    def run(ops: Any, options: dict[str, Any]) -> list[Tensor]:
        loss = ops.gaussian_feature_loss(scene.student_features, others, gt_boxes, **options)
        return [loss, *torch.autograd.grad(loss, scene.student_features)]

    for _ in range(CALLS):
        options = dict(scales=scene.student_scales, sigma_squared=rng.choice([2.0, 0.1, 50.0]))
        yield try_call(rng, run, options, [], scene, finite=finite)


def try_call(
    rng: random.Random, run: Run, options: dict[str, Any], others: list[str], scene: Scene | None, *, finite: bool
) -> str:
    """One call with these options, or with one of them, or of the ``others``, replaced by a wrong one."""
    if rng.random() < 0.15:
        wrong = {**options, rng.choice([*options, *others]): rng.choice(WRONG)}
        return refused_or_done(lambda: run(tardkd.ops, wrong))
    results = run(tardkd.ops, options)
    if rng.randrange(COMPARED):
        return "call"
    if options.get("sampling_ratio", 1) <= 0 and scene is not None and not are_of_images(scene.proposals):
        return "call"
    if finite:
        compare(results, run(reference, options), scene)
    return "compared"


def compiled_cases(rng: random.Random) -> Iterator[str]:
    """The region loss, compiled, and its gradients: as many as eager."""
    scene = random_scene(rng)
    compiled = SimpleNamespace(
        region_distill_loss=torch.compile(tardkd.ops.region_distill_loss, backend="aot_eager", dynamic=True)
    )
    options = random_options(rng)
    results = run_regions(compiled, scene, options, None)
    if are_finite(*scene.heads, *scene.student_features, *scene.teacher_features):
        compare(results, run_regions(tardkd.ops, scene, options, None), scene)
    yield "compiled"


# --- inputs -----------------------------------------------------------------------------------------------------------


def random_scene(rng: random.Random) -> Scene:
    """A scene of :func:`make_scene`, a part of whose numbers are strange ones."""
    scene = make_scene(
        rng.randrange(2**31),
        regions=rng.choice([0, 1, 2, 5, 17]),
        classes=rng.choice([1, 2, 5]),
        images=rng.choice([1, 2, 3]),
        channels=rng.choice([1, 3, 4, 8]),
        geometry=rng.choice(list(GEOMETRIES)),
        activation=rng.choice(CHOICES["activation"]),
        background=rng.choice(CHOICES["background"]),
        student_deltas=rng.choice(FORMS),
        teacher_deltas=rng.choice(FORMS),
    )
    wide = rng.random() < 0.2  # float64 mixes with no other dtype
    student = torch.float64 if wide else rng.choice([d for d in DTYPES if d != torch.float64])
    teacher = torch.float64 if wide else rng.choice([d for d in DTYPES if d != torch.float64])
    scene = scene.to(student, teacher, rng.choice(list(LAYOUTS)), rng.choice(list(LAYOUTS)))
    with torch.no_grad():
        if rng.random() < 0.5:
            spoil(rng, scene.proposals)
            spoil(rng, scene.gt_boxes)
        if rng.random() < 0.3:
            labels = torch.Generator().manual_seed(rng.randrange(2**31))
            scene.labels.random_(-2, scene.num_classes + 3, generator=labels)
        for tensor in (*scene.student_features, *scene.teacher_features, *scene.heads):
            if rng.random() < 0.02:
                spoil(rng, tensor)
    return scene


def random_pooled(rng: random.Random, scene: Scene) -> tuple[Tensor, Tensor]:
    """(R, C, h, w) of student and teacher."""
    shape = (len(scene.labels), rng.choice([1, 4, 9]), *rng.choice([(7, 7), (1, 1), (3, 5), (14, 2)]))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    sides = [torch.randn(shape, generator=generator) for _ in range(2)]
    dtypes = (scene.student_logits.dtype, scene.teacher_logits.dtype)
    student, teacher = (
        LAYOUTS[rng.choice(list(LAYOUTS))](side.to(dtype)) for side, dtype in zip(sides, dtypes, strict=True)
    )
    return student.requires_grad_(), teacher


def random_rows(rng: random.Random, scene: Scene, form: str) -> dict[str, Tensor]:
    """Scores and levels from outside, (R,) each, of some of the regions' scenes."""
    rows, given = len(scene.labels), {}
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    if rng.random() < 0.3:
        for side, like in (("student", scene.student_logits), ("teacher", scene.teacher_logits)):
            given[f"{side}_scores"] = torch.rand(rows, generator=generator).to(like.dtype)
            if rng.random() < 0.2:
                spoil(rng, given[f"{side}_scores"])
    if form == "pyramids" and rng.random() < 0.3:
        for side, levels in (("student", scene.student_features), ("teacher", scene.teacher_features)):
            given[f"{side}_levels"] = torch.randint(-1, len(levels) + 1, (rows,), generator=generator)
    return given


def random_options(rng: random.Random) -> dict[str, Any]:
    """Options of a region loss that are all right, but for those that say how the scene's heads are to be read."""
    options: dict[str, Any] = {
        name: rng.choice(names) for name, names in CHOICES.items() if name not in ("activation", "background")
    }
    options["temperature"] = rng.choice([1.0, 0.5, 2.0, 4.0])
    options["beta"] = rng.choice([0.0, 1 / 9, 1.0])
    options["box_weights"] = rng.choice([(10.0, 10.0, 5.0, 5.0), (1.0, 1.0, 1.0, 1.0)])
    return options


def spoil(rng: random.Random, tensor: Tensor) -> None:
    """Puts strange numbers into a few places."""
    if tensor.numel() == 0:
        return
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor[(0,) * (tensor.dim() - 1)]
    for _ in range(rng.randrange(1, 4)):
        flat[rng.randrange(len(flat))] = torch.tensor(rng.choice(STRANGE), dtype=torch.float64).to(flat.dtype)


def are_of_images(boxes: Tensor) -> bool:
    """Whether no finite box is so large that the reference, which makes every sample, would fill the memory."""
    return bool((boxes[boxes.isfinite()].abs() < 1e4).all())


def are_finite(*tensors: Tensor) -> bool:
    """Whether what gradients are made of is finite and no number is extreme; boxes and labels may be anything."""
    return all(tensor.isfinite().all() and (tensor.abs() < 1e4).all() for tensor in tensors)


# --- what comes out ---------------------------------------------------------------------------------------------------


def run_regions(ops: Any, scene: Scene, options: dict[str, Any], pooled: tuple[Tensor, ...] | None) -> list[Tensor]:
    """Losses, gates, scores and gradients, of the pyramids, of ``pooled`` features or, if they are none, of heads."""
    width = scene.student_logits.shape[1]
    activation = "softmax" if width == scene.num_classes + 1 else "sigmoid"
    common = dict(region_weights=scene.region_weights, activation=activation, **options)
    if pooled is None:
        losses = ops.region_distill_loss(*scene.inputs, **{**scene.scales, **LEVEL_RULE, **common})
        leaves = scene.leaves
    elif not pooled:
        losses = ops.head_distill_loss(*scene.per_region, **common)
        leaves = [scene.student_logits, scene.student_deltas]
    else:
        losses = ops.pooled_distill_loss(*pooled, *scene.per_region, **common)
        leaves = [pooled[0], scene.student_logits, scene.student_deltas]
    total = sum(loss.sum() for loss in losses[:3])
    return [*losses, *torch.autograd.grad(total, leaves)]


def refused_or_done(run: Any) -> str:
    """A wrong argument is refused by a ValueError or TypeError that says something, or does no harm."""
    try:
        run()
    except (ValueError, TypeError) as error:
        if not str(error):
            raise Finding("traceback", "a refusal without a word") from error
        return "refused"
    return "call"


def compare(results: list[Tensor], expected: list[Tensor], scene: Scene | None) -> None:
    """The results are finite where the expected ones are, and as large, for the dtypes of the scene or the results."""
    student, teacher = (
        (results[-1], results[-1]) if scene is None else (scene.student_features[0], scene.teacher_logits)
    )
    narrow = max(TOLERANCES[student.dtype].stored, TOLERANCES[teacher.dtype].value)
    # A gate may go either way where two scores are equal but for rounding; then the losses are others.
    same_gates = all(
        torch.equal(result, target) for result, target in zip(results, expected) if result.dtype == torch.bool
    )
    for number, (result, target) in enumerate(zip(results, expected, strict=True)):
        if result.dtype == torch.bool:
            continue
        result, target = result.detach().double(), target.detach().double()
        known = target.isfinite()
        if not result[known].isfinite().all():
            raise Finding("silent NaN", f"result {number} is not finite where the reference's is")
        scale = target[known].abs().max().clamp(min=0.1) if known.any() else torch.tensor(0.1)
        error = (result - target)[known].abs().max() if known.any() else torch.tensor(0.0)
        if same_gates and error > 50 * narrow * scale:
            raise Finding("wrong result", f"result {number} is off by {error:.3g} of {scale:.3g}")


warnings.filterwarnings("ignore", category=UserWarning)

TARGETS = (
    Target("region losses", region_cases),
    Target("distributions", distribution_cases),
    Target("roi_align", align_cases),
    Target("gaussian loss", gaussian_cases),
    Target("compiled region loss", compiled_cases, hang=300.0, is_slow=True),
)
