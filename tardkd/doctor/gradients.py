"""A few real training steps: what is trained, what the gates let through, and how strongly each term pulls."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import mean

import torch
from torch import Tensor

from tardkd.distill.balance import BalanceWarning, gradient_norm, split_losses
from tardkd.distill.examination import balance, gates, reach
from tardkd.distill.findings import Finding, ok, problem
from tardkd.train.batches import Part, by_step
from tardkd.train.optim import learning_rate

from .subject import Subject

STEPS = 3


@dataclass
class Measured:
    """What some training steps showed."""

    totals: list[float] = field(default_factory=list)  # the whole loss, by step
    norms: dict[str, list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )  # of each term's gradient in the backbone, by part
    stats: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # the distiller's, by step
    unreached: set[str] = field(default_factory=set)  # trained tensors that no gradient has reached
    unmoved: set[str] = field(default_factory=set)  # those of which all gradients were 0


def check_gradients(subject: Subject) -> Iterator[Finding]:
    """Take the first steps of the run, at the full weight of the distillation: its schedule is not started."""
    distiller = subject.distiller.train()
    trained = {name: parameter for name, parameter in distiller.named_parameters() if parameter.requires_grad}
    measured = Measured(unreached=set(trained), unmoved=set(trained))
    for number, parts in enumerate(islice(by_step(subject.batches(), subject.config.train.accumulate), STEPS)):
        broken = _take_step(subject, number, parts, trained, measured)
        if broken:
            images = [str(target["image_id"]) for _, targets in parts for target in targets]
            yield problem(
                f"{'; '.join(broken)} in step {number + 1}, images {', '.join(images)}",
                "look at these images; a lower optimizer.lr or a longer optimizer.warmup may help",
            )
            return
    subject.update.optimizer.zero_grad(set_to_none=True)
    yield ok(
        f"{len(measured.totals)} training steps, all terms finite; "
        f"loss {', '.join(f'{value:.3g}' for value in measured.totals)}",
        loss=measured.totals,
    )
    yield from reach(distiller, trained, measured.unreached, measured.unmoved)
    if distiller.teachers:
        stats, norms = ({name: mean(values) for name, values in of.items()} for of in (measured.stats, measured.norms))
        yield from gates(stats, distiller.settings.gate_weights)
        own = norms.pop("detector")
        shares = {name: norm / own for name, norm in norms.items()} if own else {}
        yield from balance(shares, distiller.settings, where="in the student's backbone", prefix="distill.")


def _take_step(
    subject: Subject, number: int, parts: Sequence[Part], trained: dict[str, Tensor], measured: Measured
) -> list[str]:
    """Take the run's step of that number, from 0; returns which of its losses are not finite, if any."""
    update, config = subject.update, subject.config
    backbone = subject.distiller.detector.backbone
    weights = [parameter for parameter in backbone.parameters() if parameter.requires_grad]

    def measure_terms(losses: dict[str, Tensor]) -> None:
        detector, terms = split_losses(losses)
        for name, value in {"detector": detector, **terms}.items():
            measured.norms[name].append(gradient_norm(value, weights).item())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BalanceWarning)  # the doctor says more of it
        losses, stats = update.gradients(number, parts, measure_terms)
        subject.distiller.settle()
    broken = [f"{name} is {value.item()}" for name, value in losses.items() if not torch.isfinite(value)]
    if broken:
        return broken
    measured.totals.append(float(losses["loss"]))
    for name, value in stats.items():
        measured.stats[name].append(float(value))
    reached = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    measured.unreached -= reached.keys()
    measured.unmoved -= {name for name, gradient in reached.items() if gradient.any()}
    update.clip()
    update.apply(learning_rate(config.optimizer, number, subject.steps_per_epoch, config.train.epochs))
    return []
