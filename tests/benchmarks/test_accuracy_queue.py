"""Suites of tiny runs from beginning to end: who trains what, what is left alone, and what results say."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from accuracy import queue, suites
from accuracy.anchors import level_anchors
from accuracy.data import DataSet
from accuracy.learners import Alone, Method, build_learner
from accuracy.literature import LOSSES, OF_TWO_STAGES
from accuracy.models import HEADS, Geometry, Pretrained, build_pretrained
from accuracy.queue import Places, evaluate_test, work_off
from accuracy.suites import TEACHER, UNGATED, Pair, Run
from torchvision.models import mobilenet_v2

from tardkd.data import write_scenes
from tardkd.distill import DistillSettings
from tardkd.files import FolderLock
from tardkd.train.models import ModelSpec, build_model

GEOMETRY = Geometry(short=64, long=64, anchors=(8, 16, 32), canonical=32)
TINY = ModelSpec(
    blocks=(1, 1),
    width=0.125,
    fpn_channels=8,
    head_dim=8,
    norm="group",
    anchor_sizes=GEOMETRY.anchors,
    rpn_post_nms_top_n_train=20,
    rpn_post_nms_top_n_test=10,
    box_batch_size_per_image=16,
    min_size=64,
    max_size=64,
)
LARGER = TINY.model_copy(update={"fpn_channels": 16})
METHODS = {
    "alone": Method(),
    "ours": Method(DistillSettings(feature=0.1)),
    "ours, balanced": Method(DistillSettings(feature_norm="channel"), share=0.5),
    "pkd": Method(loss="pkd"),
    "defeat": Method(loss="defeat"),
    "both": Method(DistillSettings(feature=0.0), loss="pkd"),
}


@pytest.fixture
def places(tmp_path, monkeypatch) -> Places:
    write_scenes(tmp_path / "data" / "tiny", splits={"train": 10, "test": 2}, image_size=64, seed=0)
    data = DataSet("tiny", GEOMETRY, augment={"flip": 0.5}, val=None, epochs=1)
    monkeypatch.setitem(suites.DATA, "tiny", data)
    monkeypatch.setitem(suites.PAIRS, "tiny", Pair(TINY, LARGER, lr=1e-3))
    for name, method in METHODS.items():
        monkeypatch.setitem(suites.METHODS, name, method)
    return Places(tmp_path / "data", tmp_path, tmp_path / "work", tmp_path / "results")


def test_a_suite(places):
    runs = [Run("tiny", "tiny", method, 0) for method in METHODS]
    work_off(runs, places)
    for run in runs:
        result = json.loads(places.result(run).read_text())
        assert result["AP"] == result["curve"][-1]["AP"]
        assert result["seed"] == 0
        assert result["settings"]["loss"] == METHODS[run.method].loss
        helped = any(name.startswith("distill_") for name in result["history"][0])
        assert helped == (run.method != "alone")
    teacher = places.result(Run("tiny", "tiny", TEACHER, 0))
    balanced = json.loads(places.result(runs[2]).read_text())
    assert balanced["factors"].keys() >= {"distill_feature"}
    # What is finished stays.
    changed = {path: path.stat().st_mtime_ns for path in [*map(places.result, runs), teacher]}
    work_off(runs, places)
    assert changed == {path: path.stat().st_mtime_ns for path in changed}
    evaluate_test(runs[:1], places)
    assert json.loads(places.result(runs[0]).read_text())["test"]["AP"] is not None
    assert "test" not in json.loads(places.result(runs[1]).read_text())


def test_a_run_repeats_itself(places, tmp_path):
    run = Run("tiny", "tiny", "pkd", 3)
    work_off([run], places)
    again = Places(places.data, places.weights, places.work, tmp_path / "again")
    teacher = Run("tiny", "tiny", TEACHER, 0)
    again.result(teacher).parent.mkdir(parents=True)
    again.result(teacher).write_text(places.result(teacher).read_text())
    work_off([run], again)
    first, second = (json.loads(place.result(run).read_text()) for place in (places, again))
    assert first["history"] == second["history"]
    assert first["AP"] == second["AP"]


def test_what_another_process_does_is_left_alone(places, monkeypatch):
    alone, ours = Run("tiny", "tiny", "alone", 0), Run("tiny", "tiny", "ours", 0)
    trained = []
    monkeypatch.setattr(queue, "_carry_out", lambda run, places: trained.append(run) or {"AP": 0.0, "cpu_seconds": 0.0})
    folder = places.trained(alone).parent
    folder.mkdir(parents=True)
    with FolderLock(folder) as lock:
        lock.take()
        work_off([alone, ours], places)
    assert trained == [ours]


def test_a_student_alone_is_trained_once_for_all_pairs(places, monkeypatch):
    monkeypatch.setitem(suites.PAIRS, "other teacher", Pair(TINY, TINY, lr=1e-3))
    monkeypatch.setitem(suites.PAIRS, "other rate", Pair(TINY, LARGER, lr=1e-4))
    first, twin, other = (Run("tiny", pair, "alone", 0) for pair in ("tiny", "other teacher", "other rate"))
    work_off([first, twin, other], places)
    results = [json.loads(places.result(run).read_text()) for run in (first, twin, other)]
    assert results[1] == {**results[0], "pair": "other teacher"}
    assert results[2]["history"] != results[0]["history"]
    evaluate_test([twin], places)
    assert "test" in json.loads(places.result(twin).read_text())


def test_a_pair_may_have_another_pairs_teacher(places, monkeypatch):
    monkeypatch.setitem(suites.PAIRS, "borrower", Pair(LARGER, "tiny", lr=1e-4, student_time=2.0, batch=3))
    work_off([Run("tiny", "borrower", "pkd", 0)], places)
    results = {
        pair: json.loads(places.result(Run("tiny", pair, TEACHER, 0)).read_text()) for pair in ("tiny", "borrower")
    }
    assert results["borrower"] == {**results["tiny"], "pair": "borrower"}
    assert results["borrower"]["budget"]["lr"] == 1e-3
    student = json.loads(places.result(Run("tiny", "borrower", "pkd", 0)).read_text())
    assert (student["budget"]["epochs"], student["budget"]["batch"]) == (2, 3)


def test_a_borrowed_teacher_that_trains_elsewhere_is_waited_for(places, monkeypatch):
    monkeypatch.setitem(suites.PAIRS, "borrower", Pair(LARGER, "tiny", lr=1e-3))
    folder = places.trained(Run("tiny", "tiny", TEACHER, 0)).parent
    folder.mkdir(parents=True)
    with FolderLock(folder) as lock:
        lock.take()
        work_off([Run("tiny", "borrower", "pkd", 0)], places)
    assert not places.results.exists()


def test_the_factor_of_a_search_is_the_methods_weight():
    assert Method(loss="pkd").scaled(4).weight == 4
    assert Method(DistillSettings(), share=0.5).scaled(2) == Method(DistillSettings(), share=1.0)
    scaled = Method(DistillSettings(feature=0.2, gaussian=0.1)).scaled(0.5).settings
    assert scaled.weights == {
        "feature": 0.1,
        "classification": 0.5,
        "regression": 0.5,
        "gaussian": 0.05,
        "distribution": 0.0,
    }


# --- learners ------------------------------------------------------------------------------------------------------


def batch() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])} for _ in range(2)]
    return [torch.rand(3, 64, 64, generator=generator) for _ in range(2)], targets


def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    return build_model(TINY, 3), build_model(LARGER, 3)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_adds_to_the_students_own_losses(name):
    student, teacher = models()
    learner = build_learner(METHODS[name], student, teacher).train()
    torch.manual_seed(1)
    _, losses = learner.learn(*batch())
    torch.manual_seed(1)
    expected = student(*batch())
    assert {key: value for key, value in losses.items() if not key.startswith("distill_")} == expected
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_building_a_learner_draws_nothing(name):
    student, teacher = models()
    torch.manual_seed(5)
    build_learner(METHODS[name], student, teacher)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert drawn == torch.rand(1)


def test_anchors_are_those_of_torchvision():
    student, _ = models()
    student_pass, _ = Alone(student).train().learn(*batch())
    levels = level_anchors(student, student_pass.inputs, student_pass.features)
    generator = student.rpn.anchor_generator
    sizes = [tuple(level.shape[-2:]) for level in student_pass.features]
    strides = [[torch.tensor(64 // length) for length in size] for size in sizes]
    generator.cell_anchors = generator.cell_anchors[: len(sizes)]
    for anchors, expected in zip(levels, generator.grid_anchors(sizes, strides), strict=True):
        torch.testing.assert_close(anchors.reshape(-1, 4), expected)


# --- students of other families ------------------------------------------------------------------------------------


FAMILIES = [head for head in HEADS if head != "faster_rcnn"]
NAMES = ["disc", "box", "bar"]


@pytest.fixture
def of_family(tmp_path) -> Callable[[str], torch.nn.Module]:
    """Builds a student on a trunk of random weights."""
    torch.manual_seed(0)
    torch.save(mobilenet_v2().state_dict(), tmp_path / "mobilenet_v2-0.pth")
    geometry = Geometry(short=64, long=64, anchors=(8, 16, 32, 64, 128), canonical=32)

    def build(head: str) -> torch.nn.Module:
        settings = Pretrained("mobilenet_v2", channels=32, frozen=2, head=head, head_dim=8)
        return build_pretrained(settings, geometry, 3, tmp_path)

    return build


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["ours", *(name for name in LOSSES if name not in OF_TWO_STAGES)])
def test_students_of_all_families_learn_from_faster_rcnn(of_family, family, name):
    student, teacher = of_family(family), of_family("faster_rcnn")
    ours = Method(DistillSettings(**UNGATED))  # a teacher of random weights opens no gate
    learner = build_learner(ours if name == "ours" else Method(loss=name), student, teacher, NAMES).train()
    student_pass, losses = learner.learn(*batch())
    help = torch.stack([value for key, value in losses.items() if key.startswith("distill_")]).sum()
    assert 0 < help < float("inf")
    reached = torch.autograd.grad(
        help, [level for level in student_pass.features if level.requires_grad], allow_unused=True
    )
    assert any(gradient is not None and gradient.any() for gradient in reached)


@pytest.mark.parametrize("name", OF_TWO_STAGES)
def test_what_needs_two_stages_says_so(of_family, name):
    student, teacher = of_family("fcos"), of_family("faster_rcnn")
    with pytest.raises(ValueError, match=f"{name} needs two Faster R-CNNs.*FCOS and FasterRCNN"):
        build_learner(Method(loss=name), student, teacher)


def test_maps_are_compared_where_strides_are_equal(of_family):
    student, teacher = of_family("retinanet"), of_family("faster_rcnn")
    imitation = build_learner(Method(loss="pkd"), student, teacher).imitation
    assert imitation.levels == [(0, 1), (1, 2), (2, 3)]
