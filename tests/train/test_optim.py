from __future__ import annotations

import pytest
import torch
from torch import nn

from tardkd.train.config import Optimizer
from tardkd.train.optim import build_optimizer, learning_rate, set_learning_rate


def rates(steps: list[int], **settings) -> list[float]:
    return [learning_rate(Optimizer(lr=2.0, **settings), step, steps_per_epoch=10, epochs=4) for step in steps]


def test_constant():
    assert rates([0, 39]) == [2.0, 2.0]


def test_multistep_falls_at_its_epochs():
    assert rates([0, 19, 20, 29, 30], schedule="multistep", milestones=(2, 3), gamma=0.5) == [2, 2, 1, 1, 0.5]


def test_cosine_goes_from_full_to_almost_nothing():
    first, middle, last = rates([0, 20, 39], schedule="cosine")
    assert first == 2 and middle == pytest.approx(1) and 0 < last < 0.02


def test_warm_up_rises_linearly_and_multiplies_the_schedule():
    assert rates([0, 2, 4], warmup=4, warmup_factor=0.1) == pytest.approx([0.2, 1.1, 2.0])
    plain, warm = rates([5], schedule="cosine"), rates([5], schedule="cosine", warmup=10, warmup_factor=0.5)
    assert warm[0] == pytest.approx(0.75 * plain[0])


def test_kinds_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    sgd = build_optimizer(Optimizer(kind="sgd", lr=0.1, momentum=0.8, weight_decay=0.2), model)
    assert isinstance(sgd, torch.optim.SGD) and len(sgd.param_groups[0]["params"]) == 2
    assert [sgd.param_groups[0][key] for key in ("lr", "momentum", "weight_decay")] == [0.1, 0.8, 0.2]
    adamw = build_optimizer(Optimizer(kind="adamw", lr=0.1, weight_decay=0.2), model)
    assert isinstance(adamw, torch.optim.AdamW) and adamw.param_groups[0]["weight_decay"] == 0.2
    set_learning_rate(adamw, 0.5)
    assert adamw.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="no parameter to train"):
        build_optimizer(Optimizer(), model.requires_grad_(False))
