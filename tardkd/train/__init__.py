"""Training: one lean loop, its configuration, evaluation, checkpoints, logs and plots.

>>> from tardkd.train import load_config, train
>>> result = train(load_config("my.yaml").for_role("distilled"))

The names below are imported when they are first asked for, because the command line reads this package before it knows
what it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tardkd.train.build import build_dataset, build_distiller, load_student
    from tardkd.train.config import Config, ConfigError, load_config, parse_config
    from tardkd.train.loop import Result, train
    from tardkd.train.models import ModelSpec, build_model

# The module of each name. The functions `evaluate` and `export` are not here: their modules have the same names.
_MODULES = {
    "Config": "config",
    "ConfigError": "config",
    "ModelSpec": "models",
    "Result": "loop",
    "build_dataset": "build",
    "build_distiller": "build",
    "build_model": "models",
    "load_config": "config",
    "load_student": "build",
    "parse_config": "config",
    "train": "loop",
}

__all__ = [
    "Config",
    "ConfigError",
    "ModelSpec",
    "Result",
    "build_dataset",
    "build_distiller",
    "build_model",
    "load_config",
    "load_student",
    "parse_config",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
