"""Every family of detectors through the whole of a recipe: training, evaluation, doctor, inspection and export."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from detectors.tiny import tiny_batch

from tardkd import cli
from tardkd.data import Scenes
from tardkd.detectors import for_model
from tardkd.train import checkpoint, query_models
from tardkd.train.config import ConfigError, load_config, parse_config
from tardkd.train.loop import train
from tardkd.train.models import ModelSpec, build_model
from tardkd.weights import from_content

from .recipe import recipe, teacher_file, tree
from .running import assert_same_weights, interrupted, rows, weights

RECIPES = Path(__file__).parents[2] / "recipes"
SCENES = "data={kind: scenes, image_size: 64, train: 4, val: 2}"
SMALL = ("min_size=64", "max_size=64", "fpn_channels=32", "width=0.125", "blocks=[1,1,1]")
LIGHT = {"name": "resnet_fpn", "blocks": [1, 1], "width": 0.125, "fpn_channels": 32, "norm": "group", "min_size": 64}
HEADS = {
    "retinanet": {**LIGHT, "head": "retinanet", "anchor_sizes": [16, 32]},
    "fcos": {**LIGHT, "head": "fcos"},
    "ssdlite": {"name": "ssdlite320_mobilenet_v3_large"},
}
QUERIES = {name: {"model": f"tardkd.train.query_models:{name}_r18"} for name in ("rt_detr_v2", "d_fine")}


def arguments(family: str, folder: Path) -> list[str]:
    """The recipe of the family on images of 64 pixels, with a teacher that has learned nothing: two steps."""
    options = [SCENES, f"output={folder}", "train.epochs=1", "train.batch_size=2", "train.threads=1"]
    for side in ("teacher.model",) if family == "ssdlite" else ("student", "teacher.model"):
        options += [f"{side}.{setting}" for setting in SMALL]
    if family == "ssdlite":
        options += ["teacher.model.anchor_sizes=[16,32,64,128]"]
    path = str(RECIPES / f"bccd_{family}.yaml")
    teacher = load_config(path, options).teacher.model
    torch.manual_seed(0)
    torch.save(build_model(teacher, 6).state_dict(), folder / "teacher.pth")
    return ["--config", path, "--role", "distilled", *options, f"teacher.weights={folder / 'teacher.pth'}"]


@pytest.mark.parametrize("family", ["retinanet", "fcos", "ssdlite"])
def test_the_recipe_of_the_family_trains(family, tmp_path):
    assert cli.main(["train", *arguments(family, tmp_path)]) == 0
    state = torch.load(tmp_path / "distilled" / "last.pt", weights_only=True)
    assert not any("adapter" in name or "teacher" in name for name in state["model"])
    assert cli.main(["plot", str(tmp_path / "distilled"), "--out", str(tmp_path / "curves.png")]) == 0


@pytest.mark.parametrize(
    "family", ["retinanet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fcos", "ssdlite"))]
)
def test_all_commands_take_the_family(family, tmp_path, capsys):
    recipe = arguments(family, tmp_path)
    assert cli.main(["doctor", *recipe, "--images", "2"]) == 1  # a teacher that knows nothing is a problem
    told = capsys.readouterr().out
    assert "gradients reach all" in told or "the gradient of" in told
    assert "a step takes" in told and ("has no anchors of fixed sizes" in told) == (family != "retinanet")
    run = tmp_path / "distilled"
    assert cli.main(["train", *recipe]) == 0
    assert cli.main(["eval", str(run)]) == 0
    assert cli.main(["inspect", str(run), "--out", str(tmp_path / "seen"), "--images", "1"]) == 0
    assert (tmp_path / "seen" / "regions.csv").exists()


@pytest.fixture
def small_queries(family, monkeypatch):
    """Detectors with queries that are quick on a CPU, where transformers is."""
    if family in QUERIES:
        pytest.importorskip("transformers")
        monkeypatch.setattr(query_models, "SIZE", 96)
        monkeypatch.setattr(query_models, "WIDTHS", (8, 8, 16, 16))


@pytest.mark.parametrize("family", [*HEADS, *QUERIES])
def test_a_resumed_run_is_one_that_was_not_interrupted(family, tmp_path, small_queries, monkeypatch):
    """To the bit, and so is what came before the interruption, which ran twice."""
    teacher = teacher_file(tmp_path / "teacher.pt", Scenes(1, 64, 0).class_names)
    student = {**HEADS, **QUERIES}[family]

    def config(name):
        sizes = "data.train=4", "data.val=1", "data.test=1", "optimizer.lr=0.001", f"teacher.weights={teacher}"
        return (
            recipe(tmp_path / name, *sizes).model_copy(update={"student": ModelSpec(**student)}).for_role("distilled")
        )

    whole = train(config("whole")).folder
    interrupted(monkeypatch, config("parts"), epoch=1)
    before = rows(tmp_path / "parts" / "distilled")
    parts = train(config("parts"), resume=True).folder
    assert_same_weights(weights(whole), weights(parts))
    one, two = (checkpoint.load(folder / "last.pt") for folder in (whole, parts))
    for key in ("optimizer", "task"):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)
    timeless = [
        [{k: v for k, v in row.items() if "seconds" not in k} for row in table]
        for table in (rows(whole), rows(parts), before)
    ]
    assert timeless[0] == timeless[1] and timeless[0][: len(before)] == timeless[2] and len(before) > 1


def checkpoint_of(family, folder):
    """What a training of the family leaves, but for the training."""
    config = parse_config({**tree(folder), "student": {**HEADS, **QUERIES}[family]}, source="recipe")
    config = config.for_role("baseline")
    torch.manual_seed(0)
    model = build_model(config.student, 6)
    for module in model.modules():  # as of a trained one: features that vary, and scores without ties
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    for_model(model).call(for_model(model).read_call(*tiny_batch()))
    for name, value in model.named_parameters():
        if "cls_logits" in name and value.dim() > 1:
            torch.nn.init.normal_(value, std=0.3)
    state = {"model": model.state_dict(), "classes": list("abcdef"), "config": config.plain()}
    checkpoint.save(folder / "last.pt", state)


@pytest.mark.parametrize("suffix", ["pt", "ts", "onnx"])
@pytest.mark.parametrize("family", [*HEADS, *QUERIES])
def test_export_detects_what_the_student_does(family, suffix, tmp_path, small_queries, capsys):
    """The command itself runs both and compares."""
    if suffix == "onnx" and not (find_spec("onnx") and find_spec("onnxruntime")):
        pytest.skip("needs onnx and onnxruntime")
    checkpoint_of(family, tmp_path)
    status = cli.main(["export", str(tmp_path), "--out", str(tmp_path / f"student.{suffix}")])
    if family in QUERIES and suffix == "ts":
        assert status == 2 and "TorchScript cannot be made of this detector" in capsys.readouterr().err
        assert not (tmp_path / "student.ts").exists()
    else:
        assert status == 0


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"name": "ssd300_vgg16", "min_size": 300}, "min_size: ssd300_vgg16 has none of these; it takes score_thresh"),
        ({"name": "fcos_resnet50_fpn", "box_score_thresh": 0.1}, "box_score_thresh: fcos_resnet50_fpn has none"),
        ({"head": "fcos", "fpn_channels": 48}, "a multiple of 32, found 48"),
        ({"head": "fcos", "anchor_sizes": [1, 2]}, "FCOS has points in place of anchors"),
        ({"head": "retinanet"}, "4 stages give 4 levels, found 5 sizes"),
        ({"head": "retinanet", "anchor_sizes": [8, 16, 32, 64], "head_dim": 8}, "head_dim: .* has no box head"),
        ({"name": "retinanet_resnet50_fpn", "head": "fcos"}, "head: only resnet_fpn takes these"),
        ({"name": "ssdlite320_mobilenet_v3_large", "backbone_weights": "DEFAULT"}, "backbone_weights: ssdlite320"),
    ],
)
def test_keys_that_a_family_does_not_have_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        ModelSpec(**spec)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "retinanet_resnet50_fpn", "score_thresh": 0.3, "fg_iou_thresh": 0.6},
        {"name": "retinanet_resnet50_fpn_v2", "min_size": 320},
        {"name": "fcos_resnet50_fpn", "center_sampling_radius": 2.5, "frozen_stages": 1, "freeze_norm": True},
        {"name": "ssd300_vgg16", "iou_thresh": 0.6, "nms_thresh": 0.4},
        {"name": "ssdlite320_mobilenet_v3_large", "topk_candidates": 7},
    ],
)
def test_torchvisions_one_stage_detectors(spec):
    with torch.device("meta"):
        model = build_model(ModelSpec(**spec), 5)
    detector = for_model(model)
    assert detector.head.num_classes == 5
    given = {key: value for key, value in spec.items() if hasattr(model, key)}
    assert all(getattr(model, key) == value for key, value in given.items())


@pytest.mark.parametrize("family", HEADS)
def test_another_number_of_classes_takes_all_but_the_predictor(family):
    from tardkd.train.models import load

    spec = ModelSpec(**HEADS[family])
    source, model = build_model(spec, 2), build_model(spec, 5)
    weights = from_content(source.state_dict(), "weights")
    with pytest.raises(ValueError, match="for other classes set new_head: true"):
        load(model, weights)
    load(model, weights, new_head=True)
    for name, value in model.state_dict().items():
        if not name.startswith(for_model(model).class_tensors):
            assert torch.equal(value, source.state_dict()[name])


def test_an_unknown_name_is_an_error():
    with pytest.raises(ConfigError, match="retinanet_resnet50_fpn"):
        parse_config({**tree(Path("out")), "student": {"name": "retinanet"}}, source="recipe")
