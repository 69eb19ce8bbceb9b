from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torchvision.models import resnet18, resnet50
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from tardkd.train.checkpoint import CheckpointError
from tardkd.train.models import ModelSpec, build_model

TINY = {
    "blocks": (1, 1, 1),
    "width": 0.125,
    "fpn_channels": 16,
    "head_dim": 32,
    "anchor_sizes": (16, 32, 64, 96),
    "canonical_scale": 56,
    "min_size": 64,
    "max_size": 64,
    "rpn_post_nms_top_n_train": 30,
    "rpn_post_nms_top_n_test": 20,
    "box_batch_size_per_image": 16,
    "box_detections_per_img": 10,
}


def target(*boxes: list[float]) -> dict:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.ones(len(boxes), dtype=torch.int64)}


def test_light_family_trains_and_detects():
    torch.manual_seed(0)
    model = build_model(ModelSpec(**TINY), 3)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    losses = model(images, [target([5, 5, 30, 30], [20, 20, 60, 60]), target()])
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    for output in model.eval()(images):
        assert len(output["boxes"]) <= 10


def test_light_settings_arrive():
    model = build_model(
        ModelSpec(
            **{
                **TINY,
                "norm": "group",
                "rpn_batch_size_per_image": 12,
                "box_score_thresh": 0.2,
                "rpn_pre_nms_top_n_train": 31,
                "rpn_pre_nms_top_n_test": 32,
            }
        ),
        3,
    )
    assert model.transform.min_size == (64,) and model.transform.max_size == 64
    assert model.rpn._pre_nms_top_n == {"training": 31, "testing": 32}
    assert model.rpn._post_nms_top_n == {"training": 30, "testing": 20}
    assert model.rpn.fg_bg_sampler.batch_size_per_image == 12
    assert model.rpn.anchor_generator.sizes == ((16,), (32,), (64,), (96,))
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 16
    assert model.roi_heads.detections_per_img == 10 and model.roi_heads.score_thresh == 0.2
    assert model.roi_heads.box_roi_pool.canonical_scale == 56
    assert model.roi_heads.box_predictor.cls_score.out_features == 4  # 3 classes and the background
    assert model.backbone.body.conv1.out_channels == 8 and model.backbone.body.layer3[0].conv1.out_channels == 32
    assert "layer4" not in model.backbone.body
    features = model.backbone(torch.rand(1, 3, 64, 64))
    assert {key: tuple(value.shape) for key, value in features.items()} == {
        "0": (1, 16, 16, 16),
        "1": (1, 16, 8, 8),
        "2": (1, 16, 4, 4),
        "pool": (1, 16, 2, 2),
    }
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_full_width_light_body_is_torchvisions_resnet18(tmp_path):
    torch.manual_seed(0)
    classifier = resnet18(weights=None).eval()
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pt")
    spec = ModelSpec(
        backbone_weights=str(tmp_path / "resnet18.pt"), freeze_norm=True, frozen_stages=2, fpn_channels=16, head_dim=16
    )
    model = build_model(spec, 2)
    body = model.backbone.body
    x = torch.rand(1, 3, 64, 64)
    expected = classifier.maxpool(classifier.relu(classifier.bn1(classifier.conv1(x))))
    for stage in (classifier.layer1, classifier.layer2, classifier.layer3, classifier.layer4):
        expected = stage(expected)
    torch.testing.assert_close(body(x)["3"], expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in body.modules())
    trained = {name.split(".")[0] for name, parameter in body.named_parameters() if parameter.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn_resnet50_fpn",
        "fasterrcnn_resnet50_fpn_v2",
        "fasterrcnn_resnet101_fpn",
        "fasterrcnn_mobilenet_v3_large_fpn",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
    ],
)
def test_torchvisions_own(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("tried to download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with torch.device("meta"):
        model = build_model(ModelSpec(name=name, min_size=(320, 400), max_size=500), 5)
    assert model.transform.min_size == (320, 400) and model.transform.max_size == 500
    assert model.roi_heads.box_predictor.cls_score.out_features == 6
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_state_dict_is_torchvisions(tmp_path):
    """What we train loads into torchvision's constructor, and the reverse."""
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    torch.save({"model": theirs.state_dict()}, tmp_path / "detector.pt")
    spec = ModelSpec(
        name="fasterrcnn_resnet50_fpn",
        weights=str(tmp_path / "detector.pt"),
        freeze_norm=True,
        norm_eps=0,
        frozen_stages=2,
    )
    ours = build_model(spec, 2)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    frozen = [module for module in ours.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert len(frozen) == 53 and all(module.eps == 0 for module in frozen)
    assert not ours.backbone.body.layer1[0].conv1.weight.requires_grad
    assert ours.backbone.body.layer2[0].conv1.weight.requires_grad


def test_backbone_weights_of_a_classifier(tmp_path):
    classifier = resnet50(weights=None)
    torch.save(classifier.state_dict(), tmp_path / "resnet50.pt")
    spec = ModelSpec(name="fasterrcnn_resnet50_fpn", backbone_weights=str(tmp_path / "resnet50.pt"))
    body = build_model(spec, 2).backbone.body
    assert torch.equal(body.layer4[2].conv3.weight, classifier.layer4[2].conv3.weight)


def test_new_head_takes_all_else(tmp_path):
    torch.manual_seed(0)
    first = build_model(ModelSpec(**TINY), 3)
    torch.save(first.state_dict(), tmp_path / "first.pt")
    weights = str(tmp_path / "first.pt")
    with pytest.raises(ValueError, match=r"first\.pt do not fit.*cls_score.*\(4, 32\).*\(6, 32\).*new_head"):
        build_model(ModelSpec(**TINY, weights=weights), 5)
    second = build_model(ModelSpec(**TINY, weights=weights, new_head=True), 5)
    assert torch.equal(second.rpn.head.cls_logits.weight, first.rpn.head.cls_logits.weight)
    assert torch.equal(second.roi_heads.box_head.fc6.weight, first.roi_heads.box_head.fc6.weight)
    assert second.roi_heads.box_predictor.cls_score.out_features == 6


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("backbone.fpn.layer_blocks.0.0.bias"), "1 missing: backbone.fpn"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (
            lambda state: state.update({"rpn.head.cls_logits.bias": torch.zeros(7)}),
            r"cls_logits.bias \(7,\) for \(3,\)",
        ),
        (lambda state: state.update(note="text"), "holds no state dict"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    state = build_model(ModelSpec(**TINY), 3).state_dict()
    change(state)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises((ValueError, CheckpointError), match=rf"bad\.pt.*{message}"):
        build_model(ModelSpec(**TINY, weights=str(tmp_path / "bad.pt")), 3)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_unreadable_weights(tmp_path, capsys):
    with pytest.raises(CheckpointError, match="none.pt"):
        build_model(ModelSpec(**TINY, weights=str(tmp_path / "none.pt")), 3)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CheckpointError, match="cannot read .*text.pt"):
        build_model(ModelSpec(**TINY, weights=str(tmp_path / "text.pt")), 3)
    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="cannot read .*evil.pt"):
        build_model(ModelSpec(**TINY, weights=str(tmp_path / "evil.pt")), 3)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"names": "resnet_fpn"}, "names"),
        ({"name": "yolo"}, "name"),
        ({"width": 0}, "width"),
        ({"blocks": (2,)}, "blocks"),
        ({"anchor_sizes": (8, 16)}, "one size per pyramid level.*found 2"),
        (
            {"name": "fasterrcnn_resnet50_fpn", "width": 0.5, "norm": "group"},
            "width, norm: only resnet_fpn takes these",
        ),
        ({"name": "fasterrcnn_mobilenet_v3_large_fpn", "frozen_stages": 1, "freeze_norm": True}, "frozen_stages"),
        ({"frozen_stages": 2}, "needs freeze_norm"),
        ({**TINY, "frozen_stages": 5, "freeze_norm": True}, "5 of 4 stages"),
        ({"norm": "group", "freeze_norm": True}, "norm batch"),
        ({"weights": "a.pt", "backbone_weights": "b.pt"}, "weights already holds the backbone"),
        ({"weights": "DEFAULT"}, "no DEFAULT weights"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValidationError, match=message):
        ModelSpec(**settings)


def test_default_weights_that_do_not_exist():
    with pytest.raises(ValueError, match="no DEFAULT weights for fasterrcnn_resnet101_fpn"):
        build_model(ModelSpec(name="fasterrcnn_resnet101_fpn", weights="DEFAULT"), 2)


def test_spec_survives_a_round_trip():
    spec = ModelSpec(**TINY, norm="group")
    assert ModelSpec.model_validate(spec.model_dump(mode="json")) == spec
    own = ModelSpec(name="fasterrcnn_resnet50_fpn", min_size=(640, 800))
    assert ModelSpec.model_validate(own.model_dump(mode="json")) == own
