from __future__ import annotations

import csv
import math
import shutil

import pytest
import torch
import yaml

from tardkd.train import checkpoint, late, loop, resume
from tardkd.train.batches import build_batches
from tardkd.train.blame import NonFiniteLoss
from tardkd.train.build import build_dataset, build_distiller
from tardkd.train.checkpoint import CheckpointError
from tardkd.train.config import ConfigError
from tardkd.train.loop import train

from .recipe import recipe


def columns(path):
    with open(path, newline="") as file:
        return next(csv.reader(file))


def weights(folder):
    return checkpoint.load(folder / "last.pt")["model"]


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_what_a_run_leaves_behind(runs):
    common = ["loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"]
    assert columns(runs / "baseline" / "train.csv") == ["epoch", "step", "lr", "loss", *common, "grad_norm", "seconds"]
    distilled = columns(runs / "distilled" / "train.csv")
    assert distilled[:11] == [
        "epoch",
        "step",
        "lr",
        "loss",
        *common,
        "distill_feature",
        "distill_classification",
        "distill_regression",
    ]
    assert {
        "lambda",
        "gate_feature",
        "gate_classification",
        "gate_regression",
        "foreground",
        "teacher_score",
        "student_score",
        "teacher_iou",
        "other_iou",
        "grad_norm",
    } <= set(distilled)
    for role in ("teacher", "baseline", "distilled"):
        folder = runs / role
        assert {path.name for path in folder.iterdir()} == {
            "last.pt",
            "previous.pt",
            "best.pt",
            "train.csv",
            "eval.csv",
            "config.yaml",
            "tensorboard",
        }
        state = checkpoint.load(folder / "last.pt")
        assert (state["epoch"], state["step"]) == (2, 6)
        assert yaml.safe_load((folder / "config.yaml").read_text()) == state["config"]
        with open(folder / "train.csv", newline="") as file:
            assert [row["step"] for row in csv.DictReader(file)] == list("123456")
    adapters = checkpoint.load(runs / "distilled" / "last.pt")["task"]["adapters"]
    assert adapters and not any("adapter" in name for name in weights(runs / "distilled"))


def test_the_terms_add_up_to_the_loss(runs):
    with open(runs / "distilled" / "train.csv", newline="") as file:
        for row in csv.DictReader(file):
            terms = [float(value) for name, value in row.items() if name.startswith(("loss_", "distill_"))]
            assert math.isclose(sum(terms), float(row["loss"]), rel_tol=1e-4)


def test_the_rate_that_is_logged_is_the_rate_that_is_used(runs):
    with open(runs / "baseline" / "train.csv", newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates[0] < rates[2] > rates[5] > 0  # warm-up, then the cosine
    (group,) = checkpoint.load(runs / "baseline" / "last.pt")["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(rates[-1], rel=1e-5)


def test_every_epoch_has_its_own_order_and_views(tmp_path):
    config = recipe(tmp_path)
    dataset = build_dataset(config, "train", augment=True)
    first, again, second = (list(build_batches(config, dataset, epoch=epoch)) for epoch in (0, 0, 1))

    def ids(batches):
        return [target["image_id"] for _, targets in batches for target in targets]

    assert ids(first) == ids(again) != ids(second)
    views = [
        {target["image_id"]: image for images, targets in batches for image, target in zip(images, targets)}
        for batches in (first, again, second)
    ]
    shared = views[0].keys() & views[2].keys()
    assert all(torch.equal(views[0][key], views[1][key]) for key in views[0])
    assert not any(torch.equal(views[0][key], views[2][key]) for key in shared)


def test_a_run_repeats_exactly(runs, tmp_path):
    train(recipe(tmp_path).for_role("baseline"))
    assert_same_weights(weights(tmp_path / "baseline"), weights(runs / "baseline"))


def test_baseline_and_distilled_differ_by_the_distillation_alone(runs, tmp_path):
    """Same first weights, same batches and views, same random numbers in the first step."""
    baseline = recipe(runs).for_role("baseline")
    distilled = recipe(runs).for_role("distilled")
    names = build_dataset(baseline, "val").class_names
    plain = build_distiller(baseline, names)
    after_plain = torch.rand(1)
    paired = build_distiller(distilled, names)
    after_paired = torch.rand(1)
    assert_same_weights(plain.student.state_dict(), paired.student.state_dict())
    assert after_plain == after_paired
    first = {}
    for role in ("baseline", "distilled"):
        with open(runs / role / "train.csv", newline="") as file:
            first[role] = next(csv.DictReader(file))
    for name in ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"):
        assert first["baseline"][name] == first["distilled"][name]


class Stopped(Exception):
    pass


def interrupted(monkeypatch, config, epoch):
    """Train, and stop as a crash would in the middle of `epoch` (from 0)."""
    original = loop.RunLog.step

    def step(self, at_epoch, at_step, *args, **kwargs):
        original(self, at_epoch, at_step, *args, **kwargs)
        if at_epoch == epoch + 1:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(loop.RunLog, "step", step)
        with pytest.raises(Stopped):
            train(config)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("role", ["baseline", "distilled"])
def test_resuming_continues_exactly(runs, tmp_path, monkeypatch, role, kind):
    def config(name):
        extra = f"optimizer.kind={kind}", f"teacher.weights={runs}/teacher/last.pt", "data.train=5"
        return recipe(tmp_path / name, *extra).for_role(role)

    whole = train(config("whole"))
    interrupted(monkeypatch, config("parts"), epoch=1)
    torch.rand(5)  # a new process would not have the old generators, either
    parts = train(config("parts"), resume=True)
    assert_same_weights(weights(whole.folder), weights(parts.folder))
    one, two = (checkpoint.load(result.folder / "last.pt") for result in (whole, parts))
    torch.testing.assert_close(one["optimizer"], two["optimizer"], rtol=0, atol=0)
    torch.testing.assert_close(one["task"], two["task"], rtol=0, atol=0)
    assert (one["metrics"], one["best_ap"], one["step"]) == (two["metrics"], two["best_ap"], two["step"])
    first, second = ((result.folder / "train.csv").read_text().splitlines() for result in (whole, parts))
    assert [line.rsplit(",", 1)[0] for line in first] == [line.rsplit(",", 1)[0] for line in second]  # but for seconds


def test_resuming_a_finished_run_does_nothing(runs, tmp_path):
    before = (runs / "baseline" / "last.pt").read_bytes()
    result = train(recipe(runs).for_role("baseline"), resume=True)
    assert (runs / "baseline" / "last.pt").read_bytes() == before
    assert result.metrics["AP"] is not None


def test_resume_refuses_another_run(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"other settings: optimizer.lr \(0.01 -> 0.5\), train.epochs \(2 -> 3\)"):
        train(recipe(runs, "optimizer.lr=0.5", "train.epochs=3", "train.workers=1").for_role("baseline"), resume=True)
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        train(recipe(tmp_path).for_role("baseline"), resume=True)


def test_a_run_that_was_moved_goes_on_with_the_same_teacher_alone(runs, tmp_path, monkeypatch):
    """The recipe's own teacher lies beside it: another `output` is another path to the same weights."""
    shutil.copytree(runs / "teacher", tmp_path / "old" / "teacher")
    interrupted(monkeypatch, recipe(tmp_path / "old").for_role("distilled"), epoch=1)
    (tmp_path / "old").rename(tmp_path / "new")
    config = recipe(tmp_path / "new").for_role("distilled")
    other = tmp_path / "other.pt"
    state = checkpoint.load(tmp_path / "new" / "teacher" / "last.pt")
    name = "roi_heads.box_predictor.cls_score.bias"
    checkpoint.save(other, {**state, "model": {**state["model"], name: state["model"][name] + 1}})
    with pytest.raises(ConfigError, match=f"teacher.weights {other} holds other weights than the run began with"):
        train(recipe(tmp_path / "new", f"teacher.weights={other}").for_role("distilled"), resume=True)
    train(config, resume=True)
    assert_same_weights(weights(tmp_path / "new" / "distilled"), weights(runs / "distilled"))


def test_several_teachers_are_compared_one_by_one():
    flat = resume._flat({"teacher": [{"weights": "a", "model": {"width": 1}}, {"weights": "b"}], "sizes": [1, 2]})
    assert flat == {"teacher.0.weights": "a", "teacher.0.model.width": 1, "teacher.1.weights": "b", "sizes": [1, 2]}
    assert [bool(resume.MOVABLE.fullmatch(key)) for key in flat] == [True, False, True, False]


def test_an_output_folder_in_use_is_refused(runs, tmp_path):
    config = recipe(tmp_path, "train.epochs=1", "data.train=2").for_role("baseline")
    folder = tmp_path / "baseline"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "train.csv").write_text("epoch,step\n9,9\n")
    with pytest.raises(ConfigError, match=r"is in use \(it holds train.csv\); --resume"):
        train(config)
    assert (folder / "train.csv").read_text() == "epoch,step\n9,9\n"
    train(config, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert "9,9" not in (folder / "train.csv").read_text()


def test_nothing_is_made_where_the_run_cannot_start(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint at .*teacher/last.pt"):
        train(recipe(tmp_path).for_role("distilled"))
    with pytest.raises(ConfigError, match="teacher.weights: required"):
        train(recipe(tmp_path / "x"))
    assert not list(tmp_path.iterdir())


def test_a_teacher_of_other_classes_is_refused(runs, tmp_path):
    path = tmp_path / "teacher.pt"
    state = checkpoint.load(runs / "teacher" / "last.pt")
    checkpoint.save(path, {**state, "classes": [f"no {name}" for name in state["classes"]]})
    with pytest.raises(ValueError, match="no class of the teacher teaches one of the student's; student: target, "):
        train(recipe(tmp_path, f"teacher.weights={path}").for_role("distilled"))


def test_a_teacher_from_a_plain_state_dict(runs, tmp_path):
    path = tmp_path / "plain.pth"
    torch.save(weights(runs / "teacher"), path)
    config = recipe(runs, f"teacher.weights={path}").for_role("distilled")
    names = build_dataset(config, "val").class_names
    assert_same_weights(build_distiller(config, names).teacher.state_dict(), weights(runs / "teacher"))
    unknown = recipe(tmp_path, f"teacher.weights={path}", "teacher.model=null")
    with pytest.raises(ConfigError, match="teacher.model: required, because .*plain.pth does not say"):
        train(unknown)
    wrong = recipe(tmp_path, f"teacher.weights={path}", "teacher.model.head_dim=32").for_role("distilled")
    with pytest.raises(ValueError, match="weights .*plain.pth do not fit"):
        train(wrong)


@pytest.mark.parametrize("devices", [set(), {"cpu"}], ids=["at once", "late"])  # as on a CPU, and as on a GPU
@pytest.mark.parametrize("term", ["loss_objectness", "distill_regression"])
def test_a_loss_that_is_not_finite_stops_with_its_name_step_and_images(runs, tmp_path, monkeypatch, term, devices):
    monkeypatch.setattr(late, "LATE_DEVICES", devices)
    original = loop.build_distiller

    def broken(*args):
        distiller = original(*args)
        forward = distiller.forward

        def with_nan(images, targets):
            losses = forward(images, targets)
            return {**losses, term: losses[term] * math.nan} if distiller.schedule.step == 1 else losses

        distiller.forward = with_nan
        return distiller

    monkeypatch.setattr(loop, "build_distiller", broken)
    config = recipe(tmp_path, f"teacher.weights={runs}/teacher/last.pt", "data.train=4").for_role("distilled")
    message = rf"loss is nan; {term} is nan at step 2, images \d, \d; .*failed.pt holds"
    with pytest.raises(NonFiniteLoss, match=message):
        train(config)
    assert not (tmp_path / "distilled" / "last.pt").exists()


def test_gradients_are_clipped(tmp_path):
    config = recipe(
        tmp_path,
        "train.epochs=1",
        "data.train=2",
        "optimizer.clip_norm=1e-6",
        "optimizer.momentum=0",
        "optimizer.weight_decay=0",
        "optimizer.warmup=0",
        "optimizer.lr=1",
    ).for_role("baseline")
    start = build_distiller(config, build_dataset(config, "val").class_names).student.state_dict()
    train(config)
    end = weights(tmp_path / "baseline")
    moved = math.sqrt(sum(float((end[name] - start[name]).double().square().sum()) for name in start))
    assert 0 < moved < 2e-6


def test_bf16_and_channels_last_run(runs, tmp_path):
    config = recipe(
        tmp_path,
        "train.amp=bf16",
        "train.channels_last=true",
        "train.epochs=1",
        "data.train=2",
        f"teacher.weights={runs}/teacher/last.pt",
    ).for_role("distilled")
    train(config)
    assert all(value.dtype != torch.bfloat16 for value in weights(tmp_path / "distilled").values())


def test_the_best_checkpoint_is_that_of_the_best_epoch(tmp_path, monkeypatch):
    scores = iter([3.0, 5.0, 4.0])

    def evaluate(*_):
        return {"AP": next(scores), **dict.fromkeys(("AP50", "AP75", "APs", "APm", "APl"), 0.0), "per_class": {}}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    result = train(recipe(tmp_path, "train.epochs=3", "data.train=2").for_role("baseline"))
    assert result.best_ap == 5.0 and result.metrics["AP"] == 4.0
    best, last = (checkpoint.load(tmp_path / "baseline" / name) for name in ("best.pt", "last.pt"))
    assert (best["epoch"], best["metrics"]["AP"], last["epoch"], last["best_ap"]) == (2, 5.0, 3, 5.0)


def test_a_checkpoint_from_before_a_setting_existed_is_resumed(runs, tmp_path):
    """With that setting at its default; at another value it would be another run."""
    shutil.copytree(runs / "baseline", tmp_path / "baseline")
    state = checkpoint.load(tmp_path / "baseline" / "last.pt")
    del state["config"]["train"]["group_by_aspect"]
    checkpoint.save(tmp_path / "baseline" / "last.pt", state)
    train(recipe(tmp_path).for_role("baseline"), resume=True)
    with pytest.raises(ConfigError, match="train.group_by_aspect"):
        train(recipe(tmp_path, "train.group_by_aspect=false").for_role("baseline"), resume=True)
