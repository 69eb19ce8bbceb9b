"""A few real training steps: what is trained, what the gates let through, and how strongly each term pulls."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from statistics import mean

import torch
from torch import Tensor, nn

from tardkd.train.loop import build_batches
from tardkd.train.optim import build_optimizer, learning_rate, set_learning_rate

from .report import Finding, first, ok, problem, warning
from .subject import Subject

STEPS = 3
SHARE = 0.3  # of the detector's gradient norm: where we would start a term, by our own choice
STRONG, WEAK = 1.0, SHARE / 10  # shares that are worth a warning


def check_gradients(subject: Subject) -> Iterator[Finding]:
    config, distiller = subject.config, subject.distiller
    distiller.train()
    optimizer = build_optimizer(config.optimizer, distiller)
    trained = {name: parameter for name, parameter in distiller.named_parameters() if parameter.requires_grad}
    backbone = [parameter for parameter in distiller.student.backbone.parameters() if parameter.requires_grad]
    batches = build_batches(config, subject.train_set, epoch=0)
    unreached, unmoved, totals = set(trained), set(trained), []
    norms: dict[str, list[float]] = defaultdict(list)  # of each term's gradient in the backbone, by step
    stats: dict[str, list[float]] = defaultdict(list)
    for step, batch in enumerate(islice(batches, STEPS)):
        with subject.autocast():
            losses = distiller(*subject.to_device(batch))  # the schedule is not started: lambda is 1
        distiller.settle()
        broken = [f"{name} is {value.item()}" for name, value in losses.items() if not torch.isfinite(value)]
        if broken:
            yield problem(
                f"{'; '.join(broken)} in step {step + 1}, images "
                f"{', '.join(str(target['image_id']) for target in batch[1])}",
                "look at these images; a lower optimizer.lr or a longer optimizer.warmup may help",
            )
            return
        for name, value in _parts(losses).items():
            norms[name].append(_gradient_norm(value, backbone))
        loss = sum(losses.values())
        totals.append(float(loss.detach()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        unreached -= {name for name, parameter in trained.items() if parameter.grad is not None}
        unmoved -= {name for name, parameter in trained.items() if parameter.grad is not None and parameter.grad.any()}
        for name, value in distiller.stats.items():
            stats[name].append(float(value))
        set_learning_rate(optimizer, learning_rate(config.optimizer, step, len(batches), config.train.epochs))
        torch.nn.utils.clip_grad_norm_(trained.values(), config.optimizer.clip_norm or math.inf)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    yield ok(
        f"{len(totals)} training steps, all terms finite; loss {', '.join(f'{value:.3g}' for value in totals)}",
        loss=totals,
    )
    yield from _reach(distiller, trained, unreached, unmoved)
    if distiller.teachers:
        yield from _gates(stats, distiller.settings.weights)
        yield from _balance(norms, distiller.settings.weights)


def _parts(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """The detector's losses as one, and each term of the distillation under its name in the settings."""
    own = [value for name, value in losses.items() if not name.startswith("distill_")]
    terms = {name: value for name, value in losses.items() if name.startswith("distill_")}
    return {"detector": sum(own), **{name.removeprefix("distill_"): value for name, value in terms.items()}}


def _gradient_norm(value: Tensor, parameters: Sequence[Tensor]) -> float:
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
