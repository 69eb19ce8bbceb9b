"""transformers' detectors in recipes: trained, evaluated, and as a teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("transformers")

from tardkd import cli
from tardkd.data import Scenes
from tardkd.detectors import for_model
from tardkd.train import query_models
from tardkd.train.own_models import build_own
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
