"""What one step shows of a pair: who teaches what, which gates open, and how strongly each term pulls."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from tardkd.detectors.base import Batch

from .balance import SHARE, pulls
from .checks import FiniteCheck
from .distiller import Distiller
from .findings import Finding, Findings, first, ok, problem, skipped, warning
from .inputs import batch_fault, check_types, image_range, is_well_formed, range_fault
from .schedule import Schedule
from .settings import DistillSettings, ScheduleSettings

START = 0.3  # the share to begin with where weights are plain factors, by our own choice
# By the balance: the share to aim at, and those beyond which a warning is worth it.
AIMS = {"gradient": (SHARE, SHARE / 10, 3 * SHARE), "none": (START, START / 10, 1.0)}


def examine(distiller: Distiller, batch: Batch) -> Findings:
    """See :meth:`tardkd.distill.Distiller.check`."""
    findings = Findings()
    with _undone(distiller):
        try:
            for finding in _examine(distiller, batch):
                findings.append(finding)  # those before an error stay
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            findings.append(problem(str(error) or type(error).__name__))
    return findings


def _examine(distiller: Distiller, batch: Batch) -> Iterator[Finding]:
    if not distiller.enabled:
        yield skipped("the student is trained alone: enabled=False")
        return
    yield from _classes(distiller)
    yield from _pairing(distiller)
    check_types(batch.images)
    fault = batch_fault(batch.targets, distiller.detector.head) if is_well_formed(batch.targets) else None
    if fault:
        yield problem(fault)
        return
    student_pass, losses = distiller.step(batch)
    distiller.settle()
    low, high = image_range(batch.images).tolist()
    fault = range_fault(low, high, student_pass.inputs)
    if fault:
        yield warning(fault, "all that follows is of these images")
    values = {name: value.item() for name, value in losses.items()}
    listed = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    yield ok(f"all losses are finite: {listed}", "", **values)
    yield from gates({name: value.item() for name, value in distiller.stats.items()}, distiller.settings.gate_weights)
    if any(level.requires_grad for level in student_pass.features):
        heads = [weight for head in distiller.detector.heads for weight in head.parameters()]
        norms = {name: norm.tolist() for name, norm in pulls(losses, student_pass.features, heads).items()}
        own = norms.pop("detector")
        shares = {
            name: max((term / detector for term, detector in zip(norm, own) if detector), default=0.0)
            for name, norm in norms.items()
        }
        yield from balance(shares, distiller.settings, where="at the student's features or in its heads")
    else:
        yield warning("the student's features have no gradient", "backbone and pyramid are frozen: is that meant?")
    trained = {name: weight for name, weight in distiller.named_parameters() if weight.requires_grad}
    total = torch.stack(list(losses.values())).sum()
    gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    found = dict(zip(trained, gradients))
    unreached = {name for name, gradient in found.items() if gradient is None}
    unmoved = {name for name, gradient in found.items() if gradient is not None and not gradient.any()}
    yield from reach(distiller, trained, unreached, unmoved)


@contextmanager
def _undone(distiller: Distiller) -> Iterator[None]:
    """In training mode at the full weight of the distillation; afterwards all is as it was."""
    training, schedule, stats, check = distiller.training, distiller.schedule, distiller.stats, distiller._check_finite
    balanced = distiller._balance.state_dict()
    buffers = [(buffer, buffer.clone()) for buffer in distiller.buffers()]
    device = next(distiller.student.parameters()).device
    distiller.schedule, distiller._check_finite = Schedule(ScheduleSettings()), FiniteCheck()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            distiller.train()
            yield
    finally:
        distiller.train(training)
        distiller.schedule, distiller.stats, distiller._check_finite = schedule, stats, check
        distiller._balance.load_state_dict(balanced)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


# --- the pair -----------------------------------------------------------------------------------------------


def _classes(distiller: Distiller) -> Iterator[Finding]:
    widths = distiller.detector.head.widths
    count = "the same number of classes" if widths is None else f"heads of {widths[0]} logits"
    for teacher in distiller.frozen_teachers:
        if not teacher.classes.is_named:
            yield ok(
                f"student and {teacher.name} have {count}, taken to be the same classes in the same order",
                "student_classes and Teacher(classes=...) would match them by name",
            )
        elif not teacher.classes.pairs:
            yield problem(f"{teacher.name} teaches no class of the student's")
        else:
            yield ok(f"{teacher.name} teaches {teacher.classes.describe()}", pairs=list(teacher.classes.pairs))
    taught = {name for teacher in distiller.frozen_teachers for name in teacher.classes.taught}
    untaught = [name for name in distiller.student_classes or () if name not in taught] if taught else []
    if untaught:
        yield warning(f"no teacher for {first(untaught)}", "a class map pairs classes of other names", classes=untaught)


def _pairing(distiller: Distiller) -> Iterator[Finding]:
    own = distiller.detector.channels
    for teacher in distiller.frozen_teachers:
        theirs = teacher.detector.channels
        if teacher.level_pairs is not None:
            pairs = [f"{own[level]} to {channels}" for level, channels in zip(teacher.level_pairs, theirs)]
            channels = f"the student's channels are brought to {teacher.name}'s level by level ({', '.join(pairs)})"
        elif own[0] != theirs[0]:
            channels = (
                f"the student's {own[0]} channels are brought to {teacher.name}'s {theirs[0]} by a 1x1 convolution"
            )
        else:
            channels = f"{own[0]} channels on both sides"
        path = "as the two box heads have pooled them" if teacher.reads_pooled else "pooled again from both pyramids"
        size = f"{teacher.name} sees images {teacher.ratio:g} times as large as the student"
        features = f"{channels}, compared {path}" if distiller.settings.compares_features else "no term compares them"
        yield ok(f"features: {features}; {size}", channels=[list(own), list(theirs)], ratio=teacher.ratio)


# --- the step -----------------------------------------------------------------------------------------------


def reach(
    distiller: Distiller, trained: Mapping[str, Tensor], unreached: Collection[str], unmoved: Collection[str]
) -> Iterator[Finding]:
    """Which trained tensors no gradient has reached, or only one of zeros; and that the teachers' get none.

    Args:
        distiller: the student with its teachers.
        trained: tensors of any shape by their names.
        unreached: names of those without a gradient.
        unmoved: names of those whose gradient was 0.
    """
    unmoved = set(unmoved) - set(unreached)
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


def gates(stats: Mapping[str, float], weights: Mapping[str, float]) -> Iterator[Finding]:
    """What the gates let through.

    Args:
        stats: the distiller's, of a step or as means over several.
        weights: of the terms that each gate opens, in the settings.
    """
    if "foreground" not in stats:  # the gaussian term alone has no gates
        return
    shares = {name: stats[f"gate_{name}"] for name in ("feature", "classification", "regression") if weights[name]}
    opened = ", ".join(f"{share:.0%} for {name}" for name, share in shares.items())
    text = (
        f"{stats['foreground']:.0f} foreground regions a step, of which the gates open {opened}; mean probability "
        f"of their class {stats['teacher_score']:.2f} by the teacher, {stats['student_score']:.2f} by the student"
    )
    closed = [name for name, share in shares.items() if share == 0]
    if closed:
        yield warning(text, f"nothing is transferred by {first(closed)} yet: is the teacher good enough?", **stats)
    else:
        yield ok(text, "", **stats)


def balance(
    shares: Mapping[str, float], settings: DistillSettings, *, where: str, prefix: str = ""
) -> Iterator[Finding]:
    """The strength of each term's gradient, against that of all the detector's losses.

    Args:
        shares: the norm of each term's gradient, over that of the detector's.
        settings: the distillation's.
        where: by what the gradients are.
        prefix: what stands before the name of a setting where the user writes it.
    """
    weights, (aim, weak, strong) = settings.weights, AIMS[settings.balance]
    suggested = {name: float(f"{weights[name] * aim / share:.2g}") for name, share in shares.items() if share}
    text = f"gradient norm {where}, against the detector's own: " + ", ".join(
        f"{name} {share:.2f}" for name, share in shares.items()
    )
    numbers = {"shares": shares, "suggested": suggested}
    if settings.balance == "gradient":
        advice, otherwise = "", "is the teacher another than the student, and do the gates open?"
    else:
        listed = " ".join(f"{prefix}{name}={weight:g}" for name, weight in suggested.items())
        advice = otherwise = f"to start each at {aim:g}, a starting point of our choice: {listed}"
    far = [name for name, share in shares.items() if not weak <= share <= strong]
    if far:
        yield warning(
            f"{text}; {first(far)} {'is' if len(far) == 1 else 'are'} out of {weak:g} to {strong:g}",
            otherwise if suggested else "no term pulls at all: see the gates",
            **numbers,
        )
    else:
        yield ok(text, advice, **numbers)
