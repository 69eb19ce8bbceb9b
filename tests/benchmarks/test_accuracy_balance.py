"""The balance: each term's pull at the features becomes the wanted share of the detector's."""

from __future__ import annotations

import pytest
import torch
from accuracy.balance import Balance
from torch import Tensor

from tardkd.distill.balance import pulls


@pytest.fixture
def features() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(1, 2, 2, 2, requires_grad=True)]


def losses_of(features: list[Tensor], size: float = 1.0) -> dict[str, Tensor]:
    return {
        "loss_box": sum(level.square().sum() for level in features),
        "loss_class": features[0].sum(),
        "distill_feature": size * 50 * features[0].square().sum(),
        "distill_regression": size * 0.01 * features[1].abs().sum(),
        "distill_classification": 0 * features[0].sum(),  # all gates closed
    }


def test_every_term_gets_its_share(features):
    balance = Balance(share=0.3)
    balanced = balance(losses_of(features), features)
    norms = {name: norm[0].item() for name, norm in pulls(balanced, features).items()}
    assert norms["feature"] == pytest.approx(0.3 * norms["detector"])
    assert norms["regression"] == pytest.approx(0.3 * norms["detector"])
    assert norms["classification"] == 0
    assert balanced["loss_box"] == losses_of(features)["loss_box"]


def test_pulls_are_those_before(features):
    balance = Balance(share=0.3)
    balance(losses_of(features), features)
    norms = {name: norm[0].item() for name, norm in pulls(losses_of(features), features).items()}
    assert balance.pulls()["feature"] == pytest.approx(norms["feature"] / norms["detector"])


def test_factors_are_means_of_the_first_steps_and_stay_then(features, monkeypatch):
    monkeypatch.setattr(Balance, "STEPS", 2)
    balance = Balance(share=1.0)
    balance(losses_of(features, 1.0), features)
    first = dict(balance.factors)
    balance(losses_of(features, 3.0), features)
    second = dict(balance.factors)
    assert second["distill_feature"] == pytest.approx(first["distill_feature"] / 2)  # of 1 and 3 times the norm
    later = balance(losses_of(features, 100.0), features)
    assert balance.factors == second
    assert later["distill_feature"].item() == pytest.approx(
        second["distill_feature"] * losses_of(features, 100.0)["distill_feature"].item()
    )


def test_a_lasting_balance_follows_the_terms_but_not_the_schedule(features, monkeypatch):
    monkeypatch.setattr(Balance, "STEPS", 1)
    monkeypatch.setattr(Balance, "SELDOM", 1)
    balance = Balance(share=0.5, lasting=True)
    for _ in range(100):  # a tenth of the term, of which the schedule leaves a quarter
        balanced = balance(losses_of(features, 0.1 * 0.25), features, schedule=0.25)
    norms = {name: norm[0].item() for name, norm in pulls(balanced, features).items()}
    assert norms["feature"] == pytest.approx(0.5 * 0.25 * norms["detector"], rel=1e-3)
    before = dict(balance.factors)
    for _ in range(100):
        balance(losses_of(features, 0.0), features, schedule=0.0)
    assert balance.factors == before


def test_without_a_share_it_only_measures(features):
    balance = Balance(share=None)
    assert balance(losses_of(features), features) == losses_of(features)
    assert balance.factors == {}
    assert balance.pulls()["feature"] > 0


def test_a_student_alone_is_left_alone(features):
    losses = {name: value for name, value in losses_of(features).items() if not name.startswith("distill_")}
    assert Balance(share=0.3)(losses, features) == losses
