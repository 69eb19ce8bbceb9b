"""transformers' detectors in recipes: trained, evaluated, and as a teacher."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("transformers")

from tardkd import cli
from tardkd.data import Scenes
from tardkd.detectors import for_model
from tardkd.train import query_models
from tardkd.train.build import load_student
from tardkd.train.checkpoint import load
from tardkd.train.models import ModelSpec, build_model
from tardkd.train.own_models import OwnModelError, build_own
from tardkd.train.tables import read_table
from train.recipe import MODEL, teacher_file, tree

MODULE = "tardkd.train.query_models"


@pytest.mark.parametrize("name", ["rt_detr_v2_r18", "rt_detr_v2_r34", "d_fine_r18"])
def test_a_model_has_the_classes_and_the_size_that_it_says(name):
    detector = for_model(build_own(f"{MODULE}:{name}", 3))
    assert detector.head.widths == (3, 4) and detector.input_size == query_models.SIZE
    sizes = torch.tensor([[320.0, 240.0], [100.0, 200.0]])
    torch.testing.assert_close(detector.input_scale(sizes), torch.tensor([[1.0, 1.0], [1.6, 1.6]]))


def test_tensors_of_classes_are_those_whose_sizes_depend_on_them():
    few, many = (build_own(f"{MODULE}:d_fine_r18", count) for count in (2, 5))
    state, other = few.state_dict(), many.state_dict()
    differing = {name for name, value in state.items() if value.shape != other[name].shape}
    assert differing == {name for name in state if name.startswith(for_model(few).class_tensors)} and differing


def test_a_recipe_trains_and_examines_one_which_then_teaches_another_family(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(query_models, "SIZE", 96)  # 189 cells for 100 queries
    monkeypatch.setattr(query_models, "WIDTHS", (8, 8, 16, 16))
    monkeypatch.chdir(tmp_path)
    parts = tree(Path("runs"))
    parts["data"]["train"], parts["train"]["epochs"] = 4, 1
    parts["student"] = {"model": f"{MODULE}:rt_detr_v2_r18"}
    parts["teacher"] = {"weights": teacher_file(tmp_path / "teacher.pt", Scenes(1, 64, 0).class_names)}
    Path("one.yaml").write_text(yaml.safe_dump(parts))
    run = ["train", "--config", "one.yaml", "--role", "distilled"]
    assert cli.main(run) == 0
    header, rows = read_table(Path("runs/distilled/train.csv"))
    assert {"loss_vfl", "distill_classification"} <= set(header) and rows
    assert cli.main([*run, "--resume"]) == 0
    assert cli.main(["eval", "runs/distilled", "--split", "test"]) == 0
    assert cli.main(["inspect", "runs/distilled", "--out", "pictures"]) == 0
    cli.main(["doctor", "--config", "one.yaml", "--role", "distilled", "--images", "2"])
    assert "the teacher gets none" in " ".join(capsys.readouterr().out.split())

    parts |= {"student": dict(MODEL), "teacher": {"weights": "runs/distilled/last.pt"}, "output": "others"}
    Path("two.yaml").write_text(yaml.safe_dump(parts))
    assert cli.main(["train", "--config", "two.yaml", "--role", "distilled"]) == 0


# --- a backbone of timm's ---------------------------------------------------------------------------------------------

TRUNK = "test_efficientnet"  # of 80,000 weights


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A file of a classifier's weights, with statistics that are not those of a fresh one."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(4)
    model = timm.create_model(TRUNK)
    model.train()(torch.rand(4, 3, 64, 64))
    torch.save(model.state_dict(), tmp_path / "classifier.pt")
    return tmp_path / "classifier.pt"


@pytest.mark.parametrize("freeze_norm", [False, True])
@pytest.mark.parametrize("name", ["rt_detr_v2_r18", "d_fine_r18"])
def test_a_backbone_from_a_file_gives_the_maps_of_the_classifier(name, freeze_norm, classifier):
    """Of images normalised as timm says; frozen norms keep their activations."""
    import timm

    spec = {"model": f"{MODULE}:{name}", "backbone": TRUNK, "backbone_weights": str(classifier)}
    model = build_model(ModelSpec(**spec, freeze_norm=freeze_norm), 2).eval()
    detector = for_model(model)
    assert detector.strides == (8, 16, 32)
    alone = timm.create_model(TRUNK)
    alone.load_state_dict(torch.load(classifier, weights_only=True))
    image = torch.rand(1, 3, 96, 64)
    normalised = (image - torch.tensor(alone.pretrained_cfg["mean"])[:, None, None]) / torch.tensor(
        alone.pretrained_cfg["std"]
    )[:, None, None]
    with torch.no_grad():
        expected = alone.eval().forward_intermediates(normalised, intermediates_only=True)[-3:]
        found = model.model.backbone(image, torch.ones(1, 96, 64))
    for level, (maps, _) in zip(expected, found, strict=True):
        torch.testing.assert_close(maps, level, rtol=1e-4, atol=1e-5)
    trainable = {part for part, weight in model.named_parameters() if weight.requires_grad and "._backbone." in part}
    assert trainable and any(".bn" in part for part in trainable) == (not freeze_norm)


def test_a_recipe_trains_one_from_its_file_and_its_checkpoint_needs_none(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(query_models, "SIZE", 96)
    monkeypatch.chdir(tmp_path)
    parts = tree(Path("runs"))
    parts["data"]["train"], parts["train"]["epochs"] = 2, 1
    parts["student"] = {"model": f"{MODULE}:d_fine_r18", "backbone": TRUNK, "backbone_weights": str(classifier)}
    Path("one.yaml").write_text(yaml.safe_dump(parts))
    run = ["train", "--config", "one.yaml", "--role", "baseline"]
    assert cli.main(run) == 0
    classifier.unlink()
    assert cli.main([*run, "--resume", "train.epochs=2"]) == 0
    student = load_student(load(Path("runs/baseline/last.pt")), "last.pt")
    assert query_models._timm_trunk(student) is not None
    assert cli.main(["eval", "runs/baseline"]) == 0


def test_names_of_stages_are_flat_in_a_trunk():
    """As timm itself makes them: stages.0 of the classifier is stages_0 of the trunk."""
    timm = pytest.importorskip("timm")
    from tardkd.weights import from_content

    name = "test_convnext"
    if not timm.is_model(name):
        pytest.skip("an older timm")
    classifier = timm.create_model(name)
    model = build_own(f"{MODULE}:rt_detr_v2_r18", 2, backbone=name)
    query_models.fill_backbone(model, from_content(classifier.state_dict(), "the classifier"))
    trunk = query_models._timm_trunk(model).state_dict()
    assert any(key.startswith("stages_0.") for key in trunk)
    assert torch.equal(trunk["stages_1.blocks.0.conv_dw.weight"], classifier.stages[1].blocks[0].conv_dw.weight)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"backbone": "no_such_model"}, "timm has no model no_such_model"),
        ({"backbone": "test_vit"}, r"backbone test_vit has maps of strides .* none of 8"),
        ({"backbone": "hf-hub:x/y"}, "String should match pattern"),
        ({"backbone_weights": "x.pt"}, "backbone_weights: .* give backbone, too"),
        ({"backbone": TRUNK, "backbone_weights": "DEFAULT"}, "torchvision has no DEFAULT weights for"),
        ({"backbone": TRUNK, "weights": "x.pt", "backbone_weights": "y.pt"}, "weights already holds the backbone"),
    ],
)
def test_what_does_not_go_is_named(settings, message):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message):
        build_model(ModelSpec(model=f"{MODULE}:rt_detr_v2_r18", **settings), 2)


def test_weights_of_another_classifier_are_refused(classifier):
    state = torch.load(classifier, weights_only=True)
    state.pop("conv_stem.weight")
    torch.save(state, classifier)
    with pytest.raises(ValueError, match="1 missing: conv_stem.weight"):
        spec = {"model": f"{MODULE}:rt_detr_v2_r18", "backbone": TRUNK, "backbone_weights": str(classifier)}
        build_model(ModelSpec(**spec), 2)


def test_without_timm_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(OwnModelError, match="backbone resnet18 needs the package timm: pip install timm"):
        build_own(f"{MODULE}:rt_detr_v2_r18", 2, backbone="resnet18")


def test_torchvisions_models_have_a_backbone_of_their_own():
    with pytest.raises(ValueError, match="backbone: fcos_resnet50_fpn has its own"):
        ModelSpec(name="fcos_resnet50_fpn", backbone="resnet18")
