"""The pretrained detectors: which weights they start from, and that constant norms vanish without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accuracy.models import HEADS, Geometry, Pretrained, build_pretrained
from accuracy.trunks import fold_norms
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.ops import FrozenBatchNorm2d

from tardkd.detectors import for_model

GEOMETRY = Geometry(short=64, long=96, anchors=(8, 16, 32, 64, 128), canonical=64)
SETTINGS = Pretrained("mobilenet_v2", channels=16, head_dim=16, frozen=2)
FAMILIES = {
    "faster_rcnn": SETTINGS,
    **{head: Pretrained("mobilenet_v2", channels=32, frozen=2, head=head) for head in HEADS if head != "faster_rcnn"},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier of random weights, its norms as a training would have left them."""
    torch.manual_seed(0)
    classifier = mobilenet_v2()
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    folder = tmp_path_factory.mktemp("weights")
    torch.save(classifier.state_dict(), folder / "mobilenet_v2-00000000.pth")
    return folder


def test_the_trunk_gives_the_classifiers_maps(weights):
    model = build_pretrained(SETTINGS, GEOMETRY, 3, weights)
    classifier = mobilenet_v2().eval()
    classifier.load_state_dict(torch.load(weights / "mobilenet_v2-00000000.pth", weights_only=True))
    x = torch.rand(1, 3, 64, 96)
    maps = list(model.backbone.body(x).values())
    assert [x.shape[-1] / level.shape[-1] for level in maps] == [4, 8, 16, 32]
    torch.testing.assert_close(maps[-1], classifier.features[:18](x), rtol=1e-4, atol=1e-4)


def test_leading_parts_and_norms_stay_as_they_are(weights):
    model = build_pretrained(SETTINGS, GEOMETRY, 3, weights)
    trained = {name for name, parameter in model.backbone.body.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(("0.", "1.")) for name in trained)
    assert any(name.startswith("2.") for name in trained)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("head", HEADS)
def test_it_trains_and_detects(weights, head):
    torch.manual_seed(0)
    model = build_pretrained(FAMILIES[head], GEOMETRY, 3, weights).train()
    detector = for_model(model)
    images = [torch.rand(3, 64, 96)]
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([3])}]
    student_pass = detector.student_pass(detector.read_call(images, targets))
    total = torch.stack(list(student_pass.losses.values())).sum()
    assert total.isfinite()
    total.backward()
    body = getattr(detector.backbone, "body", detector.backbone)
    reached = {name.split(".")[0] for name, p in body.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {str(part) for part in range(2, 18)}
    assert [round(1 / scale) for scale in student_pass.scales][:3] == (
        [4, 8, 16] if head == "faster_rcnn" else [8, 16, 32]
    )
    with torch.no_grad():
        [found] = for_model(model.eval()).detect(images)
    assert found["boxes"].shape[1] == 4


def test_folding_keeps_the_function(weights):
    torch.manual_seed(0)
    model = build_pretrained(SETTINGS, GEOMETRY, 3, weights).eval().requires_grad_(False)
    x = torch.rand(1, 3, 64, 96)
    before = list(model.backbone(x).values())
    fold_norms(model)
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    for level, expected in zip(model.backbone(x).values(), before):
        torch.testing.assert_close(level, expected, rtol=1e-3, atol=1e-3)


def test_what_trains_is_not_folded(weights):
    model = build_pretrained(SETTINGS, GEOMETRY, 3, weights)
    count = sum(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    fold_norms(model)
    assert sum(isinstance(module, FrozenBatchNorm2d) for module in model.modules()) == count > 0


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mobilenet_v2-\*\.pth"):
        build_pretrained(SETTINGS, GEOMETRY, 3, tmp_path)
