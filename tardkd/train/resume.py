"""Whether a run may go on from a checkpoint: it must be the same run, but for what no weight depends on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tardkd.train import checkpoint
from tardkd.train.build import stored_config
from tardkd.train.config import Config, ConfigError

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
MOVABLE = re.compile(r"teacher(\.\d+)?\.weights")  # these files may have another path, but must hold what they held


def resumed_state(folder: Path, config: Config) -> dict[str, Any]:
    """The checkpoint to go on from; one of a different run is refused, naming the keys that differ."""
    state = checkpoint.load_last(folder)
    path = folder / checkpoint.LAST
    before = _flat(stored_config(state, path).plain())  # settings that it did not know have today's defaults
    now = _flat(config.plain())
    changed = [
        f"{key} ({before.get(key)!r} -> {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in FREE_ON_RESUME and not MOVABLE.fullmatch(key)
    ]
    if changed:
        raise ConfigError(f"{path} belongs to a run with other settings: {', '.join(changed)}")
    return state


def check_teachers(config: Config, fingerprints: Sequence[str], before: Sequence[str]) -> None:
    """Refuse teachers whose weights have other fingerprints than those `before`, which the run began with."""
    for (key, section), fingerprint, expected in zip(config.teachers.items(), fingerprints, before):
        if fingerprint != expected:
            raise ConfigError(f"{key}.weights {section.weights} holds other weights than the run began with")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys; in a list of sections the keys are places, from 0."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(place): item for place, item in enumerate(value)}
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
