"""The ops as modules."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torchvision

import tardkd.ops

from .scenes import LEVEL_RULE, make_boxes, make_scene
from .test_distribution import make_inputs
from .test_pooled_loss import make_pooled

NAMES = ["0", "1", "2", "3"]
IMAGE_SHAPES = [(96, 160), (90, 152)]


def pyramid_and_boxes(dtype=torch.float32):
    scene = make_scene(141, regions=40).to(dtype)
    features = OrderedDict(zip([*NAMES, "pool"], [*scene.student_features, scene.student_features[-1][..., :1, :1]]))
    boxes = [scene.proposals[scene.proposals[:, 0] == n, 1:].to(dtype) for n in range(2)]
    return features, boxes


@pytest.mark.parametrize(
    "names, output_size, sampling_ratio, rule",
    [
        (NAMES, 7, 2, {}),
        (NAMES, (14, 7), 0, {}),
        (NAMES, [3, 3], 1, {}),
        (NAMES[1:3], (5, 5), 2, dict(canonical_scale=56, canonical_level=3)),
        (["2"], 7, 2, {}),
        (NAMES, 7, -1, dict(canonical_scale=30)),
    ],
    ids=str,
)
def test_pooler_is_torchvisions(names, output_size, sampling_ratio, rule):
    features, boxes = pyramid_and_boxes(torch.float64)
    ours = tardkd.ops.MultiScaleRoIAlign(names, output_size, sampling_ratio, **rule)
    theirs = torchvision.ops.MultiScaleRoIAlign(names, output_size, sampling_ratio, **rule)
    actual, expected = ours(features, boxes, IMAGE_SHAPES), theirs(features, boxes, IMAGE_SHAPES)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    leaves = [features[name] for name in names]
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, leaves, upstream)
    for gradient, target in zip(gradients, torch.autograd.grad(expected, leaves, upstream)):
        torch.testing.assert_close(gradient, target, rtol=1e-12, atol=1e-12)
    assert ours.output_size == theirs.output_size
    for attribute in ("featmap_names", "sampling_ratio", "canonical_scale", "canonical_level"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)


def test_pooler_without_boxes():
    features, _ = pyramid_and_boxes()
    pooler = tardkd.ops.MultiScaleRoIAlign(NAMES, 7, 2)
    assert pooler(features, [torch.zeros(0, 4)] * 2, IMAGE_SHAPES).shape == (0, 5, 7, 7)


def test_pooler_refuses_what_it_cannot_place():
    features, boxes = pyramid_and_boxes()
    with pytest.raises(ValueError, match="image_shapes"):
        tardkd.ops.MultiScaleRoIAlign(NAMES, 7, 2)(features, boxes, [])
    with pytest.raises(ValueError, match="nowhere"):
        tardkd.ops.MultiScaleRoIAlign(["nowhere"], 7, 2)(features, boxes, IMAGE_SHAPES)


def test_pooler_in_a_torchvision_detector():
    """In the place of torchvision's own, the detector finds the same."""
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=3,
        box_detections_per_img=5,
        min_size=96,
        max_size=128,
    ).eval()
    images = [torch.rand(3, 96, 128), torch.rand(3, 80, 100)]
    with torch.no_grad():
        expected = model(images)
        pooler = model.roi_heads.box_roi_pool
        model.roi_heads.box_roi_pool = tardkd.ops.MultiScaleRoIAlign(
            pooler.featmap_names, pooler.output_size, pooler.sampling_ratio
        )
        actual = model(images)
    for one, other in zip(actual, expected):
        assert len(one["boxes"]) > 0
        for key in one:
            torch.testing.assert_close(one[key], other[key])
    assert not list(model.roi_heads.box_roi_pool.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a model"])
def test_pooler_goes_through_torchscript(inside, tmp_path):
    """The file holds torchvision's pooler, with the same settings and result."""
    features, boxes = pyramid_and_boxes()
    pooler = tardkd.ops.MultiScaleRoIAlign(NAMES[1:3], (5, 3), 2, canonical_scale=56, canonical_level=3)
    expected = pooler(features, boxes, IMAGE_SHAPES)

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = pooler

        def forward(
            self, x: dict[str, torch.Tensor], boxes: list[torch.Tensor], image_shapes: list[tuple[int, int]]
        ) -> torch.Tensor:
            return self.pool(x, boxes, image_shapes)

    torch.jit.script(Head() if inside else pooler).save(tmp_path / "scripted.pt")
    scripted = torch.jit.load(tmp_path / "scripted.pt")
    torch.testing.assert_close(scripted(dict(features), boxes, IMAGE_SHAPES), expected)


def test_losses_as_modules():
    scene = make_scene(142).to(torch.float32)
    pooled = make_pooled(scene)
    options = dict(feature_gate="foreground", temperature=2.0)

    module = tardkd.ops.RegionDistillLoss(**options, **LEVEL_RULE)
    expected = tardkd.ops.region_distill_loss(*scene.inputs, **scene.scales, **options, **LEVEL_RULE)
    for got, want in zip(module(*scene.inputs, **scene.scales), expected):
        assert torch.equal(got, want)
    assert "feature_gate='foreground'" in repr(module) and "temperature=2.0" in repr(module)

    module = tardkd.ops.PooledDistillLoss(**options)
    expected = tardkd.ops.pooled_distill_loss(
        *pooled, *scene.per_region, region_weights=scene.region_weights, **options
    )
    for got, want in zip(module(*pooled, *scene.per_region, region_weights=scene.region_weights), expected):
        assert torch.equal(got, want)

    options = dict(temperature=2.0, regression_gate="vs_student")
    module = tardkd.ops.HeadDistillLoss(**options)
    expected = tardkd.ops.head_distill_loss(*scene.per_region, region_weights=scene.region_weights, **options)
    for got, want in zip(module(*scene.per_region, region_weights=scene.region_weights), expected):
        assert torch.equal(got, want)

    sides = make_inputs()
    module = tardkd.ops.DistributionDistillLoss(temperature=2.0)
    assert torch.equal(module(*sides), tardkd.ops.distribution_distill_loss(*sides, temperature=2.0))

    gt_boxes = [make_boxes(torch.Generator().manual_seed(1), 4)] * 2
    arguments = scene.student_features, scene.teacher_features, gt_boxes
    module = tardkd.ops.GaussianFeatureLoss(sigma_squared=0.5)
    expected = tardkd.ops.gaussian_feature_loss(*arguments, scales=scene.student_scales, sigma_squared=0.5)
    assert torch.equal(module(*arguments, scales=scene.student_scales), expected)


@pytest.mark.parametrize(
    "name",
    ["RegionDistillLoss", "PooledDistillLoss", "HeadDistillLoss", "DistributionDistillLoss", "GaussianFeatureLoss"],
)
def test_modules_refuse_unknown_options(name):
    with pytest.raises(TypeError, match="temprature"):
        getattr(tardkd.ops, name)(temprature=2.0)


@pytest.mark.parametrize(
    "module, option, value",
    [
        (tardkd.ops.RegionDistillLoss, "reduction", "x"),
        (tardkd.ops.RegionDistillLoss, "output_size", 0),
        (tardkd.ops.PooledDistillLoss, "temperature", -1.0),
        (tardkd.ops.HeadDistillLoss, "box_coding", "corners"),
        (tardkd.ops.DistributionDistillLoss, "temperature", 0.0),
        (tardkd.ops.GaussianFeatureLoss, "sigma_squared", 0.0),
    ],
)
def test_a_value_that_the_call_would_refuse_is_refused_by_the_constructor(module, option, value):
    with pytest.raises(ValueError, match=f"{option} must"):
        module(**{option: value})


def test_maps_of_images_without_height():
    with pytest.raises(ValueError, match="image_shapes must hold"):
        tardkd.ops.MultiScaleRoIAlign(["0"], 7, 2)({"0": torch.zeros(1, 2, 4, 4)}, [torch.zeros(1, 4)], [(0, 8)])
