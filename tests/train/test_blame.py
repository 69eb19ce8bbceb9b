"""What is said and kept of a step that is not finite."""

from __future__ import annotations

import math

import pytest
import torch

from tardkd.train import checkpoint, late, loop
from tardkd.train.batches import build_batches
from tardkd.train.blame import NonFiniteLoss
from tardkd.train.build import build_dataset
from tardkd.train.loop import train

from .recipe import recipe
from .running import broken_at, overflows_at


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


@pytest.mark.parametrize("devices", [set(), {"cpu"}], ids=["at once", "late"])
def test_the_images_of_a_step_that_failed_are_kept(tmp_path, monkeypatch, devices):
    monkeypatch.setattr(late, "LATE_DEVICES", devices)
    broken_at(monkeypatch, {1})
    config = recipe(tmp_path).for_role("baseline")
    with pytest.raises(NonFiniteLoss, match=r"loss_objectness is nan at step 2, images \d, \d; .*failed\.pt holds"):
        train(config)
    failed = checkpoint.load(tmp_path / "baseline" / "failed.pt")
    ((images, targets),) = failed["parts"]
    assert failed["step"] == 2 and ("model" in failed) == (not devices)
    dataset = build_dataset(config, "train", augment=True)
    expected, _ = list(build_batches(config, dataset, epoch=0))[1]
    assert all(torch.equal(*pair) for pair in zip(images, expected, strict=True))
    assert {"boxes", "labels", "image_id"} <= targets[0].keys()
    monkeypatch.undo()
    train(config, overwrite=True)
    assert not (tmp_path / "baseline" / "failed.pt").exists()


@pytest.mark.parametrize("devices", [set(), {"cpu"}], ids=["at once", "late"])
@pytest.mark.parametrize("save_every", [(), ("train.save_every=1",)], ids=["epochs", "steps"])
def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(tmp_path, monkeypatch, devices, save_every):
    """At the last step of an epoch, after which nothing else would look before a save."""
    monkeypatch.setattr(late, "LATE_DEVICES", devices)
    overflows_at(monkeypatch, 3)
    config = recipe(tmp_path, "data.train=4", *save_every).for_role("baseline")
    with pytest.raises(NonFiniteLoss, match=r"the gradient's norm is inf at step 4, images \d, \d; .*failed\.pt holds"):
        train(config)
    folder = tmp_path / "baseline"
    assert checkpoint.load(folder / "last.pt")["step"] == (3 if save_every else 2)
    for path in folder.glob("*.pt"):
        state = checkpoint.load(path)
        assert all(value.isfinite().all() for value in state.get("model", {}).values()), path
    monkeypatch.undo()
    train(config, resume=True)
