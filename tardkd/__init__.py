"""Distil object detectors: shared proposals, per-region adaptive gates, fused losses."""

from __future__ import annotations

import importlib
from types import ModuleType

from .info import __version__, build_info

# Packages that are there as attributes, ``tardkd.ops`` without an import of its own. Each is imported when it is first
# asked for: they need torch, which takes seconds.
_PACKAGES = ("data", "detectors", "distill", "ops", "train")

__all__ = ["__version__", "build_info"]


def __getattr__(name: str) -> ModuleType:
    if name not in _PACKAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f".{name}", __name__)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PACKAGES])
