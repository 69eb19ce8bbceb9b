"""Distil object detectors: shared proposals, per-region adaptive gates, fused losses."""
