"""The smallest recipe that runs everything, as a fresh tree of plain dicts, and a teacher for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tardkd.train import checkpoint
from tardkd.train.config import Config, parse_config
from tardkd.train.models import build_model

MODEL: dict[str, Any] = {
    "name": "resnet_fpn",
    "blocks": [1, 1],
    "width": 0.125,
    "fpn_channels": 8,
    "head_dim": 16,
    "norm": "group",
    "anchor_sizes": [12, 24, 48],
    "canonical_scale": 56,
    "min_size": 64,
    "max_size": 64,
    "rpn_pre_nms_top_n_train": 40,
    "rpn_pre_nms_top_n_test": 20,
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 10,
    "box_batch_size_per_image": 16,
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


def teacher_file(path: Path, classes: list[str], **changes: Any) -> str:
    """A checkpoint as a teacher's training leaves it, with random weights."""
    config = recipe(path.parent, *(f"student.{key}={value}" for key, value in changes.items())).for_role("baseline")
    torch.manual_seed(3)
    model = build_model(config.student, len(classes))
    checkpoint.save(path, {"model": model.state_dict(), "classes": classes, "config": config.plain()})
    return str(path)
