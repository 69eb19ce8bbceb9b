"""Reports on small recipes, and what they say."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from rich.console import Console
from train.recipe import tree

from tardkd.doctor import examine


def doctor(folder: Path, *overrides: str, role: str = "distilled", changes: dict | None = None):
    """The report on the tiny recipe, written to a file of `folder`."""
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump({**tree(folder / "out"), **(changes or {})}))
    return examine(str(config), ["train.threads=1", *overrides], role=role, console=Console(quiet=True), images=4)


def found(report, level: str, check: str = "") -> list[str]:
    """Text and advice of the findings of that level."""
    return [
        f"{finding.text} -> {finding.advice}"
        for name, finding in report.findings
        if finding.level == level and check in name
    ]


def numbers(report, check: str, key: str):
    return next(finding.numbers[key] for name, finding in report.findings if name == check and key in finding.numbers)


def edit(folder: Path, split: str, change) -> None:
    path = folder / "data" / "annotations" / f"{split}.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
