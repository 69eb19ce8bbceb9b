"""Distil object detectors: shared proposals, per-region adaptive gates, fused losses."""

from .info import __version__, build_info

__all__ = ["__version__", "build_info"]
