"""Terms that are given a pull of their weight times the detector's, and terms whose pull dwarfs it."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from detectors.tiny import tiny_batch, tiny_detector
from torch.utils.checkpoint import checkpoint

from tardkd.distill import Distiller, DistillSettings, ScheduleSettings, balance
from tardkd.distill.balance import SHARE, Balance, BalanceWarning, BalanceWatch, gradient_norm, pulls

OPEN = {"feature_gate": "foreground", "classification_gate": "foreground", "regression_gate": "foreground"}


def pair(**settings: Any) -> Distiller:
    return Distiller(
        tiny_detector(),
        tiny_detector(seed=1),
        DistillSettings(**{**OPEN, "balance": "none", "feature_norm": "none", **settings}),
    )


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
    assert seen["regression"][0] / seen["detector"][0] == pytest.approx(1, rel=0.6)  # one digit, and other regions


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


# --- the balance -------------------------------------------------------------------------------------------


def balanced(**settings: Any) -> Distiller:
    return Distiller(tiny_detector(), tiny_detector(seed=1), DistillSettings(**{**OPEN, **settings}))


def measured(distiller: Distiller) -> dict[str, float]:
    """What each term pulls in a step, over the detector's losses, at features or in heads: where it is the stronger."""
    batch = distiller.detector.read_call(*tiny_batch())
    torch.manual_seed(0)
    student_pass, losses = distiller.step(batch)
    heads = [weight for head in distiller.detector.heads for weight in head.parameters()]
    norms = pulls(losses, student_pass.features, heads)
    return {name: (norm / norms["detector"]).max().item() for name, norm in norms.items() if name != "detector"}


@pytest.mark.parametrize("path", ["pooled", "pyramid"])
@pytest.mark.parametrize("size", [1.0, 3.0, 10.0])
def test_each_term_pulls_its_weight_whatever_its_values(size: float, path: str) -> None:
    weights = {"feature": 0.5, "classification": 0.25, "regression": 0.125, "gaussian": 1.0}
    distiller = balanced(**weights, path=path)
    with torch.no_grad():
        distiller.teacher.roi_heads.box_predictor.cls_score.weight.mul_(size)
        distiller.teacher.roi_heads.box_predictor.bbox_pred.weight.mul_(size)
    expected = {name: SHARE * weight for name, weight in weights.items()}
    assert measured(distiller) == pytest.approx(expected, rel=1e-4)


def test_the_schedule_fades_what_the_balance_has_set() -> None:
    distiller = balanced(feature=0.5, schedule=ScheduleSettings(kind="linear"))
    distiller.start(total_epochs=4, steps_per_epoch=1)
    distiller.set_progress(epoch=2, step=0)
    assert measured(distiller)["feature"] == pytest.approx(SHARE * 0.5 * 0.5, rel=1e-4)


def of_two(term: float) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Losses whose gradients at one map have the norms 2 and ``term``."""
    feature = torch.ones(1, 1, 1, 1, requires_grad=True)
    return {"loss": 2 * feature.sum(), "distill_feature": term * feature.sum()}, [feature]


def test_a_term_that_dwindles_is_followed() -> None:
    balance_ = Balance()
    for _ in range(200):
        factor = balance_({"feature": 0.3}, *of_two(4.0))["feature"]
    assert factor == pytest.approx(SHARE * 0.15)
    for _ in range(800):
        factor = balance_({"feature": 0.3}, *of_two(1.0))["feature"]
    assert factor == pytest.approx(SHARE * 0.6, rel=0.01)


def in_a_head(term: float) -> tuple[dict[str, torch.Tensor], list[torch.Tensor], list[torch.nn.Module]]:
    """Losses that pull equally at a map, and whose gradients in the head behind it have the norms 2 and ``term``."""
    feature, head = torch.ones(1, 1, 1, 1, requires_grad=True), torch.nn.Linear(1, 1)
    losses = {"loss": feature.sum() + 2 * head.bias.sum(), "distill_feature": feature.sum() + term * head.bias.sum()}
    return losses, [feature], [head]


@pytest.mark.parametrize("term, expected", [(8.0, 0.25), (0.5, 1.0)])
def test_a_term_counts_where_it_is_the_stronger(term: float, expected: float) -> None:
    balance_ = Balance()
    for _ in range(3):
        factor = balance_({"feature": 1.0}, *in_a_head(term))["feature"]
    assert factor == pytest.approx(SHARE * expected)


def test_a_term_that_features_do_not_see_is_balanced_by_heads() -> None:
    """As that of boxes where a first layer of a decoder starts at zero."""
    _, features, heads = in_a_head(1.0)
    losses = {"loss": features[0].sum() + 2 * heads[0].bias.sum(), "distill_regression": 8 * heads[0].bias.sum()}
    assert Balance()({"regression": 1.0}, losses, features, heads)["regression"] == pytest.approx(SHARE / 4)


def test_steps_in_which_a_term_does_not_pull_do_not_count() -> None:
    balance_ = Balance()
    for step in range(40):
        factor = balance_({"feature": 1.0}, *of_two(4.0 if step % 4 == 0 else 0.0))["feature"]
    assert factor == pytest.approx(SHARE * 0.5)
    nan = balance_({"feature": 1.0}, *of_two(float("nan")))["feature"]
    assert nan == pytest.approx(SHARE * 0.5)


def test_what_never_pulls_keeps_its_weight_and_what_hardly_does_is_not_made_huge() -> None:
    assert Balance()({"feature": 0.3}, *of_two(0.0))["feature"] == pytest.approx(0.3)
    assert Balance()({"feature": 0.3}, *of_two(1e-9))["feature"] == pytest.approx(0.3 * Balance.MOST)


def test_most_steps_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    measure = balance.pulls
    monkeypatch.setattr(balance, "pulls", lambda *args: seen.append(balance_._step) or measure(*args))
    balance_ = Balance()
    for _ in range(100):
        balance_({"feature": 0.3}, *of_two(4.0))
    assert seen == [*range(1, 65), 72, 80, 88, 96]


def test_the_balance_is_resumed() -> None:
    left, right = balanced(feature=0.5), balanced(feature=0.5)
    for _ in range(3):
        measured(left)
    right.load_task_state(copy.deepcopy(left.task_state()))
    batch = right.detector.read_call(*tiny_batch())
    results = []
    for distiller in (left, right):
        torch.manual_seed(5)
        results.append(distiller.step(batch)[1])
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    old = left.task_state()
    old["balance"]["sums"] = {name: torch.ones(2) for name in old["balance"]["sums"]}  # of features alone
    right.load_task_state(old)
    measured(right)
    del old["balance"]
    right.load_task_state(old)


def test_where_the_pull_cannot_be_measured_the_weights_are_factors() -> None:
    distiller, plain = balanced(feature=0.5), pair(feature=0.5, feature_norm="channel")
    for module in (distiller, plain):
        head = module.student.roi_heads.box_head
        head.forward = partial(checkpoint, head.forward, use_reentrant=True)
    (message,) = steps(distiller, 3)
    assert "use_reentrant" in message
    results = []
    for module in (distiller, plain):
        torch.manual_seed(2)
        results.append(module(*tiny_batch()))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_looking_at_a_batch_leaves_the_balance_alone() -> None:
    distiller = balanced(feature=0.5)
    measured(distiller)
    before = copy.deepcopy(distiller.task_state()["balance"])
    distiller.check(*tiny_batch())
    after = distiller.task_state()["balance"]
    assert before["step"] == after["step"] and before["sums"].keys() == after["sums"].keys()
    assert all(torch.equal(before["sums"][name], after["sums"][name]) for name in before["sums"])
