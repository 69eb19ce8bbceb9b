"""The ops as torch's dispatcher, compiler and autocast see them."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import tardkd.ops
from tardkd.ops import cuda
from tardkd.ops.inputs import RegionCall
from tardkd.ops.results import packed_pooled

from .scenes import LAYOUTS, LEVEL_RULE, make_boxes, make_scene
from .test_distribution import make_inputs
from .test_pooled_loss import make_pooled


def registered() -> set[str]:
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("tardkd::")}


# --- opcheck ----------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Notes every call of a registered op of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tardkd":
            detached = tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, args)
            self.seen.append((func, detached, kwargs or {}))
        return func(*args, **(kwargs or {}))


def calls_of_everything(dtype: torch.dtype, layout: str) -> list[tuple]:
    """Every public function, forward and backward, with and without wanting gradients."""
    scene = make_scene(121, geometry="strides").to(dtype, None, layout, layout)
    pooled = make_pooled(scene, dtype, dtype)
    gt_boxes = [make_boxes(torch.Generator().manual_seed(1), 4)] * 2
    others = [f.detach() + 1 for f in scene.student_features]
    losses = []
    with Calls() as calls:
        for reduction in ("mean", "none"):
            options = dict(reduction=reduction, region_weights=scene.region_weights)
            losses += tardkd.ops.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE, **options)[:3]
            losses += tardkd.ops.pooled_distill_loss(*pooled, *scene.per_region, **options)[:3]
            losses += tardkd.ops.head_distill_loss(*scene.per_region, **options)[:3]
            sides = make_inputs(0, len(scene.labels), 5, dtype, layout="bins first")
            losses.append(tardkd.ops.distribution_distill_loss(*sides, **options))
        tap = tardkd.ops.tap_features(scene.student_features)
        losses += tardkd.ops.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE, tap=tap)[:3]
        scales = dict(scales=scene.student_scales)
        losses.append(tardkd.ops.gaussian_feature_loss(scene.student_features, others, gt_boxes, **scales))
        losses.append(tardkd.ops.multiscale_roi_align(scene.student_features, scene.proposals, **scales))
        torch.autograd.backward([loss.sum() for loss in losses])
        with torch.no_grad():
            tardkd.ops.region_distill_loss(*scene.inputs, **scene.scales)
            tardkd.ops.region_distill_loss(*scene.inputs, **scene.scales, feature_norm="channel")
            tardkd.ops.pooled_distill_loss(*pooled, *scene.per_region)
            tardkd.ops.head_distill_loss(*scene.per_region)
    return calls.seen


def test_opcheck(host, monkeypatch):
    # The pooled gradients of closed regions are left as they are, whatever that is.
    monkeypatch.setattr(cuda, "packed_pooled", lambda *arguments: packed_pooled(*arguments).zero_())
    calls = calls_of_everything(torch.float32, "nchw")
    left_out = {"tardkd::region_distill_backward"} if host.name == "cpu" else set()  # its kernels leave nothing to do
    assert {str(func.name()) for func, _, _ in calls} == registered() - left_out
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for func, args, kwargs in calls:
        torch.library.opcheck(func, args, kwargs, test_utils=tests)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fake_results_have_the_strides_of_real_ones(host, dtype, layout):
    """They are what a compiler plans with."""
    for func, args, kwargs in calls_of_everything(dtype, layout):
        real = tree_leaves(func(*args, **kwargs))
        with FakeTensorMode() as mode:
            convert = mode.from_tensor
            fake_args = tree_map(lambda x: convert(x) if isinstance(x, torch.Tensor) else x, args)
            fake = tree_leaves(func(*fake_args, **kwargs))
        if func.name() in ("tardkd::region_distill_add", "tardkd::scale_gradients"):  # which return nothing
            continue
        assert len(real) == len(fake)
        for one, other in zip(real, fake):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride()), func


# --- torch.compile ----------------------------------------------------------------------------------


def region_step(scene):
    """A whole step, losses to gradients, that closes over nothing but options."""
    scales = dict(scene.scales)

    def step(student_features, teacher_features, *per_region):
        losses = tardkd.ops.region_distill_loss(student_features, teacher_features, *per_region, **scales, **LEVEL_RULE)
        return losses.feature * 2 + losses.classification + losses.regression, losses.gates

    return step, lambda s: s.inputs


def pooled_step(scene):
    def step(student_pooled, teacher_pooled, *per_region):
        losses = tardkd.ops.pooled_distill_loss(student_pooled, teacher_pooled, *per_region)
        return losses.feature * 2 + losses.classification + losses.regression, losses.gates

    return step, lambda s: (*make_pooled(s), *s.per_region)


def head_step(scene):
    def step(*per_region):
        losses = tardkd.ops.head_distill_loss(*per_region, box_coding="boxes")
        return losses.classification + losses.regression, losses.gates

    return step, lambda s: s.per_region


def distribution_step(scene):
    def step(student, teacher, gates):
        loss = tardkd.ops.distribution_distill_loss(student, teacher, gates, temperature=2.0)
        unreduced = tardkd.ops.distribution_distill_loss(student, teacher, gates, reduction="none")
        return loss + unreduced.square().mean(), gates

    return step, lambda s: make_inputs(0, len(s.labels), 5)


def align_step(scene):
    scales = dict(scene.scales)

    def step(student_features, teacher_features, proposals):
        student, teacher = tardkd.ops.shared_roi_align(student_features, teacher_features, proposals, **scales)
        return (student - teacher).square().mean(), teacher

    return step, lambda s: (s.student_features, s.teacher_features, s.proposals)


def unreduced_step(scene):
    scales = dict(scene.scales)

    def step(student_features, teacher_features, *per_region):
        losses = tardkd.ops.region_distill_loss(
            student_features, teacher_features, *per_region, **scales, reduction="none", feature_gate="all"
        )
        return losses.feature.square().sum() + losses.classification.sum(), losses.scores

    return step, lambda s: s.inputs


def listed_step(scene):
    """Proposals and ground truth as lists, one tensor an image."""
    scales = dict(scales=scene.student_scales)

    def boxes_of(s):
        return s.proposals, s.proposals[::2]

    def step(student_features, teacher_features, first, second):
        boxes = [first[:, 1:], second[:, 1:], first[:5, 1:]]
        pooled = tardkd.ops.multiscale_roi_align(student_features, boxes, **scales)
        loss = tardkd.ops.gaussian_feature_loss(student_features, teacher_features, boxes, **scales)
        return loss + pooled.square().mean(), pooled

    return step, lambda s: (s.student_features, [f.detach() + 1 for f in s.student_features], *boxes_of(s))


STEPS = dict(
    region=region_step,
    pooled=pooled_step,
    head=head_step,
    distribution=distribution_step,
    align=align_step,
    unreduced=unreduced_step,
    listed=listed_step,
)


def leaves_of(arguments):
    return [x for x in tree_leaves(arguments) if x.requires_grad]


@pytest.mark.parametrize("name", STEPS)
def test_compiles_whole_and_once_for_all_numbers_of_regions(host, deterministic, name):
    torch._dynamo.reset()
    options = dict(geometry="single", images=3)
    step, arguments_of = STEPS[name](make_scene(122, **options))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    first = None
    # None is a size of the maps: the compiler would take the two for one number.
    for regions in (37, 29, 71, 8, 53):
        scene = make_scene(122, regions=regions, **options).to(torch.float32)
        arguments = arguments_of(scene)
        leaves = leaves_of(arguments)
        expected, gates = step(*arguments)
        actual, compiled_gates = compiled(*arguments)
        torch.testing.assert_close(actual, expected)
        assert torch.equal(gates, compiled_gates)
        targets = torch.autograd.grad(expected, leaves, allow_unused=True)
        for gradient, target in zip(torch.autograd.grad(actual, leaves, allow_unused=True), targets):
            if target is None:  # of a loss that is not used, which counts as times zero once compiled
                assert gradient is None or not gradient.any()
            else:
                torch.testing.assert_close(gradient, target)
        first = first or counter.frame_count
        assert counter.frame_count == first, f"compiled again for {regions} regions"


@pytest.mark.slow
def test_compiles_with_inductor(host):
    torch._dynamo.reset()
    step, arguments_of = region_step(make_scene(123))
    arguments = arguments_of(make_scene(123).to(torch.float32, None, "channels_last", "nchw"))
    leaves = leaves_of(arguments)
    expected, _ = step(*arguments)
    actual, _ = torch.compile(step, fullgraph=True, dynamic=True)(*arguments)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(one, other)


# --- autocast ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, dtype):
    """Inputs are read in the dtype they come in; sums stay in float32."""
    scene = make_scene(124).to(dtype, torch.float32, device=backend.device)
    options = dict(**scene.scales, **LEVEL_RULE)
    expected = backend.ops.region_distill_loss(*scene.inputs, **options)
    with torch.autocast(backend.device.type, dtype):
        actual = backend.ops.region_distill_loss(*scene.inputs, **options)
        student, teacher = backend.ops.shared_roi_align(
            scene.student_features, scene.teacher_features, scene.proposals, **options
        )
    assert student.dtype == dtype and teacher.dtype == torch.float32
    for got, want in zip(actual, expected):
        assert got.dtype == want.dtype and torch.equal(got, want)
    for gradient, leaf in zip(torch.autograd.grad(sum(actual[:3]), scene.leaves), scene.leaves):
        assert gradient.dtype == leaf.dtype


def test_autocast_of_a_small_network(backend):
    """The dtypes that autocast really produces: features in bfloat16, boxes in float32."""
    scene = make_scene(125, images=1).to(torch.float32, device=backend.device)
    backbone = torch.nn.Conv2d(3, 5, 3, stride=4, padding=1).to(backend.device)
    head = torch.nn.Linear(5, 4 + 16).to(backend.device)
    image = torch.rand(1, 3, 96, 160, device=backend.device)
    teacher_feature = torch.randn(1, 5, 24, 40, device=backend.device)
    with torch.autocast(backend.device.type, torch.bfloat16):
        feature = backbone(image)
        pooled = backend.ops.multiscale_roi_align([feature], scene.proposals, scales=[0.25])
        logits, deltas = head(pooled.mean((2, 3))).split([4, 16], dim=1)
        losses = backend.ops.region_distill_loss(
            [feature],
            [teacher_feature],
            scene.proposals,
            logits,
            scene.teacher_logits,
            deltas,
            scene.teacher_deltas,
            scene.labels,
            scene.gt_boxes,
            student_scales=[0.25],
        )
    assert feature.dtype == logits.dtype == torch.bfloat16
    sum(losses[:3]).backward()
    for parameter in (*backbone.parameters(), *head.parameters()):
        assert parameter.grad.isfinite().all() and parameter.grad.any()


# --- without the dispatcher -------------------------------------------------------------------------


@pytest.fixture
def dispatched(monkeypatch) -> list[str]:
    """The region ops that went by the dispatcher."""
    names: list[str] = []
    pack = RegionCall.pack

    def packed(call, *args):
        names.append(call.op)
        return pack(call, *args)

    monkeypatch.setattr(RegionCall, "pack", packed)
    return names


def test_who_looks_on_sees_the_ops(dispatched):
    """The kernels are called directly where nobody does; they make the same of it."""
    scene = make_scene(122).to(torch.float32)

    def step() -> list[torch.Tensor]:
        losses = tardkd.ops.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE)
        return [*losses, *torch.autograd.grad(sum(losses[:3]), scene.leaves)]

    expected = step()
    assert dispatched == []
    with Calls() as calls:
        assert all(map(torch.equal, step(), expected))
    names = [op.name() for op, *_ in calls.seen]
    assert names.count("tardkd::region_distill") == len(dispatched) == 2
    assert "tardkd::scale_gradients" in names
    with torch.autograd.profiler.profile() as profile:
        step()
    assert sum(event.name == "tardkd::region_distill" for event in profile.function_events) == 2
    with FakeTensorMode() as mode:
        fakes = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x, scene.inputs)
    dispatched.clear()
    losses = tardkd.ops.region_distill_loss(*fakes, **scene.scales, **LEVEL_RULE)
    assert type(losses.feature) is type(fakes[2]) and dispatched == ["region_distill"]
