"""Terms whose gradient dwarfs the detector's."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from detectors.tiny import tiny_batch, tiny_detector
from torch.utils.checkpoint import checkpoint

from tardkd.distill import Distiller, DistillSettings, balance
from tardkd.distill.balance import BalanceWarning, BalanceWatch, gradient_norm, pulls

OPEN = {"feature_gate": "foreground", "classification_gate": "foreground", "regression_gate": "foreground"}


def pair(**settings: Any) -> Distiller:
    return Distiller(tiny_detector(), tiny_detector(seed=1), DistillSettings(**{**OPEN, **settings}))


def steps(distiller: Distiller, count: int) -> list[str]:
    """Take so many steps without moving a weight; returns the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            sum(distiller(*tiny_batch()).values()).backward()
    return [str(warning.message) for warning in caught if warning.category is BalanceWarning]


@pytest.mark.parametrize("path", ["pooled", "pyramid"])
@pytest.mark.parametrize("term", ["feature", "classification", "regression", "gaussian"])
def test_a_term_that_dwarfs_the_detector_is_named_once(term: str, path: str) -> None:
    (message,) = steps(pair(**{term: 1e6, "path": path}), 5)
    assert "in step 1 " in message and f"distill_{term} " in message
    assert "load_teacher_weights" in message and f"{term} to " in message


def test_a_term_of_ordinary_weight_is_none() -> None:
    assert steps(pair(feature=0.1, classification=0.1, regression=0.1), 5) == []


def test_the_weight_that_is_named_makes_term_and_detector_equal() -> None:
    (message,) = steps(pair(feature=0.0, classification=0.0, regression=1e6), 1)
    weight = float(message.rsplit("regression to ")[1].split()[0])
    distiller = pair(feature=0.0, classification=0.0, regression=weight)
    torch.manual_seed(0)
    seen: dict[str, torch.Tensor] = {}
    distiller._watch_balance = lambda losses, features, weights: seen.update(pulls(losses, features))
    distiller(*tiny_batch())
    assert seen["regression"] / seen["detector"] == pytest.approx(1, rel=0.6)  # one digit, and other regions


def test_it_comes_again_later_where_it_was_not_there_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    measure = balance.pulls

    def record(*args: Any) -> dict[str, torch.Tensor]:
        seen.append(watch._step)
        return measure(*args)

    monkeypatch.setattr(balance, "pulls", record)
    monkeypatch.setattr(balance, "SELDOM", 16)
    distiller = pair(feature=0.1, classification=0.1, regression=0.1)
    watch = distiller._watch_balance
    assert steps(distiller, 33) == []
    assert seen == [1, 2, 4, 8, 16, 32]


def test_to_measure_changes_nothing() -> None:
    """The same losses and gradients, and no gradient of any parameter before the backward."""
    distiller = pair(feature=1e6)
    plain = copy.deepcopy(distiller)
    plain._watch_balance = lambda *args: None
    results = []
    for module in (plain, distiller):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = module(*tiny_batch())
        assert all(parameter.grad is None for parameter in module.parameters())
        sum(losses.values()).backward()
        results.append((losses, [parameter.grad for parameter in module.parameters()]))
    (left, left_gradients), (right, right_gradients) = results
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert all(torch.equal(*gradients) for gradients in zip(left_gradients, right_gradients, strict=True))


def test_the_norm_is_that_of_all_tensors_together() -> None:
    x, y, z = (torch.tensor([value], requires_grad=True) for value in (1.0, 2.0, 3.0))
    assert gradient_norm((3 * x + 4 * y).sum(), [x, y, z]) == 5
    assert gradient_norm((2 * z).sum(), [x, y]) == 0


def test_nothing_is_measured_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(balance, "pulls", fail)
    with torch.no_grad():
        pair(feature=1e6)(*tiny_batch())
    frozen = pair(feature=0.0)
    frozen.student.backbone.requires_grad_(False)
    frozen(*tiny_batch())
    ended = DistillSettings()
    BalanceWatch()({"loss": torch.ones(())}, [torch.ones(1, 1, 1, 1)], ended.weights)


def test_a_graph_that_can_be_walked_only_once_is_left_alone() -> None:
    """A reentrant checkpoint refuses torch.autograd.grad."""
    distiller = pair(feature=1e6)
    head = distiller.student.roi_heads.box_head
    plain = head.forward
    head.forward = lambda x: checkpoint(plain, x, use_reentrant=True)
    assert steps(distiller, 3) == []
    assert all(parameter.grad is not None for parameter in head.parameters())
