"""What holds for all inputs, looked for among random ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tardkd.ops import reference

from .parity import TERMS, assert_losses_match, losses_and_gradients
from .scenes import GEOMETRIES, LAYOUTS, LEVEL_RULE, make_boxes, make_scene
from .test_gaussian import assert_gaussian_matches
from .test_pooled_loss import make_pooled
from .test_region_loss import DTYPES
from .test_roi_align import assert_roi_align_matches, upstream_like

coordinate = st.one_of(
    st.floats(-50, 250, width=32),
    st.sampled_from([0.0, -0.0, 1.0, 32.0, 95.99, 96.0, 160.0, -1e4, 1e4, 3e38]),
)
boxes = st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), min_size=1, max_size=12)


def recipes():
    """What a scene is made from; plain values, so that a failing example can be read."""
    return st.fixed_dictionaries(
        dict(
            seed=st.integers(0, 10**6),
            regions=st.integers(1, 40),
            classes=st.integers(1, 6),
            images=st.integers(1, 3),
            channels=st.integers(1, 20),
            geometry=st.sampled_from(list(GEOMETRIES)),
            activation=st.sampled_from(["softmax", "sigmoid"]),
            background=st.sampled_from(["first", "last"]),
            boxes=boxes,
            dtypes=st.sampled_from(list(DTYPES)),
            layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 2),
        )
    )


def cook(recipe):
    """The scene, with the boxes in the place of its first proposals, and its options."""
    recipe = dict(recipe)
    corners, dtypes, layouts = (recipe.pop(key) for key in ("boxes", "dtypes", "layouts"))
    scene = make_scene(**recipe)
    first, second = torch.tensor(corners[: recipe["regions"]]).split(2, 1)
    scene.proposals[: len(first), 1:] = torch.cat([torch.minimum(first, second), torch.maximum(first, second)], 1)
    scene = scene.to(*DTYPES[dtypes], *layouts)
    return scene, {key: recipe[key] for key in ("activation", "background")}


def decided(scene, **options) -> bool:
    """No gate hangs on the last digits."""
    wide = scene.doubled()
    scores = reference.region_distill_loss(*wide.inputs, **wide.scales, **options).scores
    margins = torch.stack([scores[:, 0] - scores[:, 1], scores[:, 2] - scores[:, 3]]).abs()
    return bool((margins[scores[:, [0, 2]].T != 0] > 1e-5).all())


@given(recipes(), st.sampled_from(["squared", "absolute", "smooth_l1"]), st.sampled_from(["uniform", "gaussian"]))
def test_region_loss_agrees_with_the_reference(host, recipe, feature_loss, bin_weight):
    scene, options = cook(recipe)
    assume(decided(scene, **options))
    options |= dict(feature_loss=feature_loss, bin_weight=bin_weight, region_weights=scene.region_weights)
    assert_losses_match(host.ops, scene, **options)
    assert_losses_match(host.ops, scene, feature_gate="all", reduction="none", **options)


@given(recipes(), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_pooled_loss_agrees_with_the_reference(host, recipe, size):
    scene, options = cook(recipe)
    assume(decided(scene, **options))
    dtypes = scene.student_logits.dtype, scene.teacher_logits.dtype
    pooled = make_pooled(scene, *dtypes, size=size, channels=scene.student_features[0].shape[1])
    assert_losses_match(host.ops, scene, pooled=pooled, feature_gate="all", bin_weight="gaussian", **options)


@given(recipes(), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(1, 4), st.booleans())
def test_roi_align_agrees_with_the_reference(host, recipe, output_size, sampling_ratio, aligned):
    scene, _ = cook(recipe)
    options = dict(output_size=output_size, sampling_ratio=sampling_ratio, aligned=aligned, **LEVEL_RULE)
    assert_roi_align_matches(host.ops, scene.student_features, scene.proposals, scales=scene.student_scales, **options)


@given(recipes(), st.floats(0.05, 20.0), st.data())
def test_gaussian_agrees_with_the_reference(host, recipe, sigma_squared, data):
    scene, _ = cook(recipe)
    images = scene.student_features[0].shape[0]
    scene.teacher_features = [torch.randn(f.shape).to(f.dtype) for f in scene.student_features]
    gt_boxes = [torch.tensor(data.draw(boxes)) for _ in range(images)]
    assert_gaussian_matches(host.ops, scene, gt_boxes, sigma_squared=sigma_squared)


@given(recipes())
def test_the_order_of_the_regions_does_not_matter(host, recipe):
    scene, options = cook(recipe)
    scene = scene.doubled()
    order = torch.randperm(len(scene.labels), generator=torch.Generator().manual_seed(0))
    losses, gradients = losses_and_gradients(host.ops, scene, **options)
    shuffled = scene.rows(order)
    shuffled.student_logits, shuffled.student_deltas = (
        x.detach().requires_grad_() for x in (shuffled.student_logits, shuffled.student_deltas)
    )
    other, other_gradients = losses_and_gradients(host.ops, shuffled, **options)
    assert torch.equal(other.gates, losses.gates[order]) and torch.equal(other.scores, losses.scores[order])
    for term in TERMS:
        torch.testing.assert_close(getattr(other, term), getattr(losses, term), rtol=1e-12, atol=1e-14)
    for one, two in zip(gradients[:-2], other_gradients[:-2]):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-13)
    for one, two in zip(gradients[-2:], other_gradients[-2:]):
        torch.testing.assert_close(one[order], two, rtol=1e-12, atol=1e-14)


# --- the same bits ----------------------------------------------------------------------------------


def everything(ops, scene, **options):
    """All results and gradients of all ops, as one list of tensors."""
    losses, gradients = losses_and_gradients(ops, scene, **options)
    pooled = make_pooled(scene, scene.student_logits.dtype, scene.teacher_logits.dtype)
    pooled_losses, pooled_gradients = losses_and_gradients(ops, scene, pooled=pooled, **options)
    aligned = ops.multiscale_roi_align(
        scene.student_features, scene.proposals, scales=scene.student_scales, **LEVEL_RULE
    )
    aligned_gradients = torch.autograd.grad(aligned, scene.student_features, upstream_like(aligned))
    generator = torch.Generator().manual_seed(0)
    loss = ops.gaussian_feature_loss(
        scene.student_features,
        [f.detach() + 1 for f in scene.student_features],
        [make_boxes(generator, 9) for _ in range(scene.student_features[0].shape[0])],
        scales=scene.student_scales,
    )
    gaussian_gradients = torch.autograd.grad(loss, scene.student_features)
    return [
        *losses,
        *gradients,
        *pooled_losses,
        *pooled_gradients,
        aligned,
        *aligned_gradients,
        loss,
        *gaussian_gradients,
    ]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed"])
@pytest.mark.parametrize("geometry", ["equal", "strides"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_and_threads_change_no_bit(cpu, dtype, geometry, layout, reduction):
    scene = make_scene(131, regions=300, channels=19, images=3, geometry=geometry).to(dtype, None, layout, layout)
    options = dict(reduction=reduction, feature_gate="all", classification_gate="all")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append(everything(cpu.ops, scene, **options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other):
            assert torch.equal(one, two)


def test_deterministic_mode_is_accepted(cpu):
    """No op that torch would refuse."""
    scene = make_scene(132).to(torch.float32)
    expected = everything(cpu.ops, scene)
    torch.use_deterministic_algorithms(True)
    try:
        actual = everything(cpu.ops, scene)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two in zip(expected, actual):
        assert torch.equal(one, two)


def test_calls_from_several_threads_at_once(cpu):
    """The kernels run without the interpreter's lock."""
    from concurrent.futures import ThreadPoolExecutor

    scenes_ = [make_scene(seed, regions=64).to(torch.float32) for seed in range(133, 137)]
    expected = [everything(cpu.ops, scene) for scene in scenes_]
    with ThreadPoolExecutor(4) as pool:
        for actual, target in zip(pool.map(lambda s: everything(cpu.ops, s), scenes_ * 4), expected * 4):
            for one, two in zip(actual, target):
                assert torch.equal(one, two)
