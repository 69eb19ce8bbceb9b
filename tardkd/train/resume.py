"""Whether a run may go on from a checkpoint: it must be the same run, but for what no weight depends on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tardkd.train import checkpoint
from tardkd.train.build import stored_config
from tardkd.train.checkpoint import CheckpointError
from tardkd.train.config import Config, ConfigError
from tardkd.train.optim import learning_rate

# Settings that may differ on resume. Weights depend on none of them but for rounding; what the student began with is
# in the checkpoint.
FREE_ON_RESUME = {
    "output",
    "data.root",
    "train.threads",
    "train.workers",
    "train.log_every",
    "train.save_every",
    "train.device",
    "train.accumulate",
    "train.on_non_finite",
    "student.weights",
    "student.new_head",
    "student.backbone_weights",
}
RESUMED = (  # what a checkpoint must have beside the student, of which type, and what it is
    ("epoch", int, "the number of finished epochs"),
    ("batch", int, "the steps done since"),
    ("step", int, "the steps done in all"),
    ("best_ap", (int, float), "the best average precision"),
    ("metrics", dict, "those of the last evaluation"),
    ("task", dict, "the state of the distillation"),
    ("optimizer", dict, "the state of the optimizer"),
)
MOVABLE = re.compile(r"teacher(\.\d+)?\.weights")  # these files may have another path, but must hold what they held


LENGTH = "train.epochs"  # which may grow


def resumed_state(folder: Path, config: Config) -> dict[str, Any]:
    """The checkpoint to go on from; one of a different run is refused, naming the keys that differ.

    More epochs than the run began with are no difference: they lengthen it.

    Raises:
        CheckpointError: there is none, or it is not whole.
        ConfigError: it belongs to another run.
    """
    state = checkpoint.load_last(folder)
    path = folder / checkpoint.LAST
    _check_resumable(state, path)
    before = _flat(stored_config(state, path).plain())  # settings that it did not know have today's defaults
    now = _flat(config.plain())
    changed = [
        f"{key} ({before.get(key)!r} -> {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in FREE_ON_RESUME and not MOVABLE.fullmatch(key)
    ]
    grows = config.train.epochs > before[LENGTH]
    if changed and not (grows and all(change.startswith(f"{LENGTH} ") for change in changed)):
        raise ConfigError(f"{path} belongs to a run with other settings: {', '.join(changed)}")
    return state


def _check_resumable(state: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint that lacks what a run goes on with."""
    checkpoint.check_trained(state, path)
    for key, kind, what in RESUMED:
        checkpoint.require(state, path, key, kind, what)
    if "teachers" in state:
        checkpoint.require(state, path, "teachers", list, "the fingerprints of the teachers")
    if "data" in state:  # earlier versions did not note it
        checkpoint.require(state, path, "data", dict, "the fingerprints of the data")
    negative = [key for key in ("epoch", "batch", "step") if state[key] < 0]
    if negative:
        raise CheckpointError(f"{path} is damaged: {', '.join(negative)} must not be negative")


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Say which checkpoint it is that does not fit, whatever the optimizer and the models raise of it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, (ConfigError, CheckpointError)):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"it lacks {reason}"
        raise CheckpointError(
            f"{path} does not hold what this run goes on with: {reason}; a whole checkpoint, such as "
            f"{checkpoint.PREVIOUS}, may be copied to its place"
        ) from None


def lengthened(config: Config, before: Config, steps_per_epoch: int, step: int) -> str | None:
    """What it means for the schedules that a run goes on for more epochs; None where it does not.

    The rate of step `step` (from 0), which comes next, is told as both lengths have it.
    """
    old, new = before.train.epochs, config.train.epochs
    if new <= old:
        return None
    rates = [learning_rate(config.optimizer, step, steps_per_epoch, epochs) for epochs in (old, new)]
    parts = [f"lengthened from {old} to {new} epochs"]
    if config.optimizer.schedule == "cosine":
        parts.append(f"the cosine of the learning rate is over all {new}: it is {rates[1]:.3g} now, not {rates[0]:.3g}")
    else:
        parts.append(f"the learning rate goes on at {rates[1]:.3g}")
    if config.distill.enabled and config.distill.schedule.kind != "constant":
        parts.append(f"the {config.distill.schedule.kind} schedule of the distillation is over all {new}, too")
    return "; ".join(parts)


def check_teachers(config: Config, fingerprints: Sequence[str], before: Sequence[str]) -> None:
    """Refuse teachers whose weights have other fingerprints than those `before`, which the run began with."""
    for (key, section), fingerprint, expected in zip(config.teachers.items(), fingerprints, before):
        if fingerprint != expected:
            raise ConfigError(f"{key}.weights {section.weights} holds other weights than the run began with")


def check_data(fingerprints: Mapping[str, str], before: Mapping[str, str], folder: Path) -> None:
    """Refuse data whose fingerprints, by the names of the splits, are others than those that the run began with."""
    for split, fingerprint in fingerprints.items():
        if fingerprint != before.get(split, fingerprint):
            raise ConfigError(
                f"data.{split} holds other images or annotations than the run began with: put those back, or start a "
                f"new run from its weights, into another output, with --init-from {folder}"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys; in a list of sections the keys are places, from 0."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(place): item for place, item in enumerate(value)}
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
