"""``tardkd doctor``: look at everything that a long run depends on, before it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import Console

from tardkd.distill.findings import Finding, skipped
from tardkd.train.config import Role

from . import anchors, data, gradients, settings, speed, teacher
from .report import Report
from .subject import Subject

__all__ = ["Report", "examine"]

# The checks in their order. Each runs where all that it needs could be built, and leaves what it builds in the subject.
CHECKS: tuple[tuple[str, Callable[[Subject], Iterator[Finding]], tuple[str, ...]], ...] = (
    ("output", settings.check_output, ("config",)),
    ("device", settings.check_device, ("config",)),
    ("training data", data.check_train, ("config",)),
    ("validation", data.check_val, ("config",)),
    ("classes", data.check_classes, ("train_set", "val_set")),
    ("overlap", data.check_overlap, ("train_set", "val_set")),
    ("optimizer", settings.check_optimizer, ("config",)),
    ("models", teacher.check_models, ("config",)),
    ("anchors", anchors.check_anchors, ("train_set", "distiller")),
    ("precision", teacher.check_precision, ("val_set", "distiller")),
    ("gradients", gradients.check_gradients, ("train_set", "distiller")),
    ("speed", speed.check_speed, ("train_set", "distiller")),
)


def examine(
    path: str,
    overrides: list[str] | tuple[str, ...] = (),
    *,
    role: Role | None = None,
    images: int = 50,
    thorough: bool = False,
    console: Console | None = None,
) -> Report:
    """Make every check of the run that ``tardkd train`` would start from the same arguments. Nothing is written.

    Args:
        images: how many images of a split are opened, and how many validation images the models are tried on.
        thorough: open all images.
    """
    report, subject = Report(console or Console()), Subject(images, thorough)
    report.run("configuration", settings.check_configuration(subject, path, list(overrides), role))
    for name, check, needs in CHECKS:
        lacking = subject.lacks(needs)
        report.run(name, [skipped(f"needs {lacking}")] if lacking else check(subject))
    report.close()
    return report
