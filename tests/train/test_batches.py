"""Whose turn which images are."""

from __future__ import annotations

import pytest
import torch

from tardkd.train.batches import build_batches
from tardkd.train.build import build_dataset
from tardkd.train.config import ConfigError
from tardkd.train.distributed import Processes
from tardkd.train.loop import train

from .recipe import recipe


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


def test_a_batch_that_does_not_divide(tmp_path):
    config = recipe(tmp_path, "train.batch_size=4", "train.accumulate=3")
    with pytest.raises(ConfigError, match="batch_size 4 does not divide into 1 processes times train.accumulate 3"):
        train(config.for_role("baseline"))
    with pytest.raises(ConfigError, match="batch_size 4 does not divide into 3 processes"):
        build_batches(recipe(tmp_path, "train.batch_size=4"), [], processes=Processes(count=3))
