"""A wrong setting is refused by name."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest

from tardkd import ops
from tardkd.detectors.base import HeadSettings
from tardkd.distill import DistillSettings, ScheduleSettings
from tardkd.ops.spec import CHOICES, LossSpec


@pytest.mark.parametrize(
    "key, value",
    [
        ("feature", -1.0),
        ("classification", math.nan),
        ("regression", math.inf),
        ("gaussian", -0.1),
        ("distribution", -0.1),
        ("beta", -1.0),
        ("temperature", 0.0),
        ("sigma_squared", 0.0),
        ("teacher_input_ratio", 0.0),
        ("sharing", "mine"),
        ("feature_gate", "teacher_better"),
        ("classification_gate", "vs_proposal"),
        ("regression_gate", "all"),
        ("feature_loss", "huber"),
        ("bin_weight", "mask"),
        ("path", "fast"),
    ],
)
def test_wrong_value(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"DistillSettings\.{key} is {value!r}"):
        DistillSettings(**{key: value})


@pytest.mark.parametrize(
    "key, value",
    [
        ("kind", "exponential"),
        ("per", "step"),
        ("warmup", -1),
        ("stop", 0.0),
        ("stop", 1.5),
        ("gamma", -0.5),
        ("milestones", (0.5, 0.2)),
        ("milestones", (8,)),
    ],
)
def test_wrong_schedule(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"ScheduleSettings\.{key} is "):
        ScheduleSettings(**{key: value})


@pytest.mark.parametrize(
    "owner, key, value",
    [
        (DistillSettings, "feature", "1"),
        (DistillSettings, "classification", True),
        (DistillSettings, "schedule", "linear"),
        (ScheduleSettings, "warmup", 0.5),
        (ScheduleSettings, "stop", None),
    ],
)
def test_wrong_type(owner: type, key: str, value: object) -> None:
    with pytest.raises(TypeError, match=rf"{owner.__name__}\.{key} must be .*got {value!r}"):
        owner(**{key: value})


def test_nothing_to_distil() -> None:
    with pytest.raises(ValueError, match=r"feature, classification, regression, gaussian, distribution are all 0"):
        DistillSettings(feature=0, classification=0, regression=0)


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DistillSettings().feature = 2.0


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, True),
        ({"feature_gate": "all"}, False),
        ({"classification_gate": "all"}, False),
        ({"feature_gate": "all", "feature": 0}, True),
        ({"classification_gate": "all", "classification": 0}, True),
        ({"feature_gate": "foreground", "classification_gate": "foreground"}, True),
    ],
)
def test_foreground_only(settings: dict[str, object], expected: bool) -> None:
    assert DistillSettings(**settings).foreground_only is expected


def test_defaults_are_the_ops() -> None:
    parameters = inspect.signature(ops.region_distill_loss).parameters
    settings = DistillSettings()
    for key in (
        "feature_gate",
        "classification_gate",
        "regression_gate",
        "temperature",
        "beta",
        "feature_loss",
        "bin_weight",
    ):
        assert getattr(settings, key) == parameters[key].default, key


def test_every_choice_is_taken_and_known_to_the_ops() -> None:
    for key in ("feature_loss", "bin_weight", "feature_gate", "classification_gate", "regression_gate"):
        for value in CHOICES[key]:
            assert getattr(DistillSettings(**{key: value}), key) == value
        with pytest.raises(ValueError, match=f"choose one of {', '.join(CHOICES[key])}$"):
            DistillSettings(**{key: "none of them"})


def test_the_ops_are_told_of_settings_and_head() -> None:
    head = HeadSettings("last", "sigmoid", (1.0, 2.0, 3.0, 4.0), None)
    settings = DistillSettings(feature_loss="absolute", feature_gate="all", temperature=2.0, beta=0.5)
    spec = settings.loss_spec(head, "sum")
    assert spec == LossSpec(
        feature_loss="absolute",
        feature_gate="all",
        temperature=2.0,
        beta=0.5,
        box_weights=(1.0, 2.0, 3.0, 4.0),
        background="last",
        activation="sigmoid",
        reduction="sum",
        feature_norm="channel",
    )
    options = inspect.signature(ops.pooled_distill_loss).parameters
    assert set(spec._asdict()) <= set(options)
    shared = {field.name for field in dataclasses.fields(settings)} & set(options)
    assert all(getattr(settings, name) == getattr(spec, name) for name in shared)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, True),
        ({"feature": 0.0}, False),
        ({"feature": 0.0, "gaussian": 1.0}, True),
    ],
)
def test_compares_features(settings: dict[str, float], expected: bool) -> None:
    assert DistillSettings(**settings).compares_features is expected


@pytest.mark.parametrize(
    "regions, expected", [("proposals", "vs_proposal"), ("anchors", "vs_student"), ("objects", "vs_student")]
)
def test_only_a_proposal_is_a_guess_to_improve_on(regions: str, expected: str) -> None:
    head = HeadSettings("first", "softmax", (10.0, 10.0, 5.0, 5.0), (4, 4), regions=regions)
    assert DistillSettings().loss_spec(head, "mean").regression_gate == expected
    assert DistillSettings(regression_gate="foreground").loss_spec(head, "mean").regression_gate == "foreground"
