"""The smallest recipe that runs everything, as a fresh tree of plain dicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tardkd.train.config import Config, parse_config

MODEL: dict[str, Any] = {
    "name": "resnet_fpn", "blocks": [1, 1], "width": 0.125, "fpn_channels": 8, "head_dim": 16, "norm": "group",
    "anchor_sizes": [12, 24, 48], "canonical_scale": 56, "min_size": 64, "max_size": 64,
    "rpn_pre_nms_top_n_train": 40, "rpn_pre_nms_top_n_test": 20, "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 10, "box_batch_size_per_image": 16,
}


def tree(output: Path) -> dict[str, Any]:
    return {
        "data": {"kind": "scenes", "image_size": 64, "train": 7, "val": 2, "test": 2},
        "augment": {"flip": 0.5, "scale": [0.8, 1.2]},
        "student": dict(MODEL),
        "teacher": {"model": {**MODEL, "width": 0.25, "fpn_channels": 16}},
        "optimizer": {"kind": "sgd", "lr": 0.01, "warmup": 2, "clip_norm": 10.0, "schedule": "cosine"},
        "train": {"epochs": 2, "batch_size": 2, "threads": 1, "log_every": 2},
        "output": str(output),
    }


def recipe(output: Path, *overrides: str) -> Config:
    return parse_config(tree(output), overrides, source="test recipe")
