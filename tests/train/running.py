"""Trainings that go wrong in one way, and what trainings leave behind."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from tardkd.train import checkpoint, loop
from tardkd.train.loop import train
from tardkd.train.update import Update


def weights(folder):
    return checkpoint.load(folder / "last.pt")["model"]


def assert_same_weights(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


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


def rows(folder):
    with open(folder / "train.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def broken_at(monkeypatch, steps, term="loss_objectness", where="loss"):
    """A distiller whose term is NaN at these steps (from 0)."""
    original = loop.build_distiller

    def build(*args):
        distiller = original(*args)
        forward = distiller.forward

        def with_nan(images, targets):
            if where == "images" and distiller.schedule.step in steps:
                images = [image * float("nan") for image in images]
            losses = forward(images, targets)
            if where == "loss" and distiller.schedule.step in steps:
                losses[term] = losses[term] * float("nan")
            return losses

        distiller.forward = with_nan
        return distiller

    monkeypatch.setattr(loop, "build_distiller", build)


def overflows_at(monkeypatch, step):
    """A gradient that is infinite at this step (from 0), where the losses are not."""
    original = Update.gradients

    def gradients(self, number, parts):
        found = original(self, number, parts)
        if number == step:
            self._parameters[0].grad.view(-1)[0] = math.inf
        return found

    monkeypatch.setattr(Update, "gradients", gradients)
