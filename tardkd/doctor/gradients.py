"""A few real training steps: what is trained, what the gates let through, and how strongly each term pulls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import mean

import torch
from torch import Tensor, nn

from tardkd.detectors.parts import backbone
from tardkd.train.batches import Part, by_step
from tardkd.train.optim import learning_rate

from .report import Finding, first, ok, problem, warning
from .subject import Subject

STEPS = 3
SHARE = 0.3  # where we would start a term, by our own choice: its share of the detector's gradient norm
STRONG, WEAK = 1.0, SHARE / 10  # shares that are worth a warning


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
    yield from _reach(distiller, trained, measured.unreached, measured.unmoved)
    if distiller.teachers:
        yield from _gates(measured.stats, distiller.settings.weights)
        yield from _balance(measured.norms, distiller.settings.weights)


def _take_step(
    subject: Subject, number: int, parts: Sequence[Part], trained: dict[str, Tensor], measured: Measured
) -> list[str]:
    """Take the run's step of that number, from 0; returns which of its losses are not finite, if any."""
    update, config = subject.update, subject.config
    weights = [parameter for parameter in backbone(subject.distiller.student).parameters() if parameter.requires_grad]

    def measure_terms(losses: dict[str, Tensor]) -> None:
        for name, value in _terms(losses).items():
            measured.norms[name].append(_gradient_norm(value, weights))

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


def _terms(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """The detector's losses as one, and each term of the distillation under its name in the settings."""
    detector = [value for name, value in losses.items() if not name.startswith("distill_")]
    terms = {name: value for name, value in losses.items() if name.startswith("distill_")}
    return {"detector": sum(detector), **{name.removeprefix("distill_"): value for name, value in terms.items()}}


def _gradient_norm(value: Tensor, parameters: Sequence[Tensor]) -> float:
    """The length of the gradient of `value` () by all `parameters` together; the graph is kept."""
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _reach(
    distiller: nn.Module, trained: dict[str, Tensor], unreached: set[str], unmoved: set[str]
) -> Iterator[Finding]:
    unmoved = unmoved - unreached
    frozen = sum(not parameter.requires_grad for parameter in distiller.parameters())
    if unreached:
        names = sorted(unreached)
        yield problem(
            f"no gradient reaches {len(names)} of {len(trained)} trained tensors: {first(names)}",
            "they will stay as they are; freeze them, or see why no loss uses them",
            tensors=names,
        )
    if unmoved:
        names = sorted(unmoved)
        yield warning(
            f"the gradient of {len(names)} of {len(trained)} trained tensors was 0 each time: {first(names)}",
            "dead units, or steps without an object? Watch these",
            tensors=names,
        )
    if not unreached and not unmoved:
        rest = f"; {frozen} are frozen by the recipe" if frozen else ""
        yield ok(f"gradients reach all {len(trained)} trained tensors{rest}", trained=len(trained), frozen=frozen)
    if not distiller.teachers:
        return
    touched = [
        name
        for teacher in distiller.teachers
        for name, parameter in teacher.named_parameters()
        if parameter.requires_grad or parameter.grad is not None
    ]
    if touched:
        yield problem(f"{len(touched)} tensors of the teacher get gradients: {first(touched)}", tensors=touched)
    else:
        yield ok("the teacher gets none: it stays as it is")


def _gates(stats: dict[str, list[float]], weights: dict[str, float]) -> Iterator[Finding]:
    means = {name: mean(values) for name, values in stats.items()}
    if "foreground" not in means:  # the gaussian term alone has no gates
        return
    gates = {name: means[f"gate_{name}"] for name in ("feature", "classification", "regression") if weights[name]}
    opened = ", ".join(f"{share:.0%} for {name}" for name, share in gates.items())
    text = (
        f"{means['foreground']:.0f} foreground regions a step, of which the gates open {opened}; mean probability "
        f"of their class {means['teacher_score']:.2f} by the teacher, {means['student_score']:.2f} by the student"
    )
    closed = [name for name, share in gates.items() if share == 0]
    if closed:
        yield warning(text, f"nothing is transferred by {first(closed)} yet: is the teacher good enough?", **means)
    else:
        yield ok(text, **means)


def _balance(norms: dict[str, list[float]], weights: dict[str, float]) -> Iterator[Finding]:
    """The strength of each term's gradient in the student's backbone, against that of all the detector's losses."""
    detector = mean(norms["detector"])
    shares = {name: mean(values) / detector for name, values in norms.items() if name != "detector"} if detector else {}
    suggested = {name: float(f"{weights[name] * SHARE / share:.2g}") for name, share in shares.items() if share}
    text = "gradient norm in the student's backbone, against the detector's own: " + ", ".join(
        f"{name} {share:.2f}" for name, share in shares.items()
    )
    advice = f"to start each at {SHARE:g}, a starting point of our choice: " + " ".join(
        f"distill.{name}={weight:g}" for name, weight in suggested.items()
    )
    far = [name for name, share in shares.items() if not WEAK <= share <= STRONG]
    numbers = {"shares": shares, "suggested": suggested}
    if far:
        yield warning(
            f"{text}; {first(far)} {'is' if len(far) == 1 else 'are'} out of {WEAK:g} to {STRONG:g}",
            advice if suggested else "no term pulls at all: see the gates",
            **numbers,
        )
    else:
        yield ok(text, advice, **numbers)
