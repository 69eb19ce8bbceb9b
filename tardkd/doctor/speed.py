"""How long a step takes and of what, how much memory, and what that makes of the whole run."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from tardkd.detectors.sampling import fewer_regions, region_count
from tardkd.distill import Distiller
from tardkd.distill.findings import Finding, ok, skipped, warning
from tardkd.train.batches import Part, by_step
from tardkd.train.update import Update

from .subject import Subject

STEPS = 3
FULL = 0.9  # share of a GPU's memory
SLOW = 0.5  # seconds of a step that make it worth to try fewer regions
MANY = 256  # regions of an image from which on fewer are tried: a quarter
FASTER = 0.8  # of the time of a step, where fewer regions are worth a word


def check_speed(subject: Subject) -> Iterator[Finding]:
    """Take the run's step without moving a weight, whole and in parts."""
    config, update = subject.config, subject.update
    subject.distiller.train()
    steps, loading = _load(subject)
    student = _student_seconds(subject, steps)
    teacher = _teacher_seconds(subject, steps) if subject.distiller.teachers else 0.0

    def whole_step(parts: Sequence[Part]) -> None:
        update.gradients(0, parts)
        update.clip()
        update.apply(0.0)

    if subject.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(subject.device)
    step = _seconds(subject, steps, whole_step)
    rest = max(0.0, step - student - teacher)  # 0 where a GPU runs the teacher beside the student
    text = f"the student {_duration(student)}"
    if teacher:
        compiled = " (not compiled here)" if any(section.compile for section in config.teachers.values()) else ""
        text += f", the teacher {_duration(teacher)}{compiled}, the distillation and"
    else:
        text += ","
    workers = config.train.workers
    text = (
        f"a step takes {_duration(step)}: {text} the rest {_duration(rest)}; loading its images "
        f"{_duration(loading)} with {workers} workers"
    )
    numbers = {"step": step, "loading": loading, "student": student, "teacher": teacher, "rest": rest}
    if loading > step:
        yield warning(text, _faster_loading(loading / step, workers), **numbers)
    else:
        yield ok(text, **numbers)
    if step > SLOW:
        yield from _try_fewer_regions(subject, steps[:1], whole_step, step)
    yield _memory(subject)
    yield _estimate(subject, max(step, loading) if workers else step + loading)


def _try_fewer_regions(
    subject: Subject, steps: Sequence[tuple[Part, ...]], whole_step: Callable[[Any], Any], seconds: float
) -> Iterator[Finding]:
    """What a step takes where a quarter of the regions train the box heads, if that is much less than `seconds`."""
    student = subject.distiller.detector
    count = region_count(student)
    if count is None:
        yield skipped(f"a {type(student.model).__name__} trains on all its regions: there is no number to lower")
        return
    if count < MANY:
        return
    fewer = count // 4
    with fewer_regions(student, fewer):
        shorter = _seconds(subject, steps, whole_step)
    if shorter < FASTER * seconds:
        setting = f"box_batch_size_per_image={fewer}"
        where = "student." if subject.config.student.model is None else "in your function, "
        yield ok(
            f"{count} regions of an image train the box head; with {fewer} a step takes {_duration(shorter)}",
            f"{where}{setting} may be enough where images hold few objects",
            with_fewer=shorter,
            regions=fewer,
        )


def _load(subject: Subject) -> tuple[list[tuple[Part, ...]], float]:
    """The batches of a few steps, and the seconds that the images of a step take to load."""
    workers = subject.config.train.workers
    wanted = 1 + max(STEPS, 4 * workers)  # workers have some batches ready before they are asked
    steps, waits = [], []
    tick = time.perf_counter()
    for parts in by_step(subject.batches(), subject.config.train.accumulate):
        waits.append(time.perf_counter() - tick)
        if len(steps) < STEPS:
            steps.append(parts)
        if len(waits) == wanted:
            break
        tick = time.perf_counter()
    rest = waits[1:] or waits  # the first one also starts the workers
    return steps, mean(rest) if workers else median(rest)


def _seconds(subject: Subject, steps: Sequence[Any], work: Callable[[Any], Any]) -> float:
    """The median over the steps, after one run to warm up."""
    work(steps[0])
    laps = []
    for parts in steps:
        began = _now(subject)
        work(parts)
        laps.append(_now(subject) - began)
    return median(laps)


def _student_seconds(subject: Subject, steps: Sequence[tuple[Part, ...]]) -> float:
    """Forward and backward of the student without a teacher: what the step of a baseline would take."""
    alone = Distiller(subject.distiller.student, None, enabled=False)
    update = Update(subject.config, alone, subject.processes)
    return _seconds(subject, steps, lambda parts: update.gradients(0, parts))


def _teacher_seconds(subject: Subject, steps: Sequence[tuple[Part, ...]]) -> float:
    """What the distillation asks of the teachers: their backbones, and their heads."""
    detectors = [teacher.detector for teacher in subject.distiller.frozen_teachers]
    modules = [module for detector in detectors for module in (detector.backbone, *detector.heads)]
    with _stopwatch(subject, *modules) as laps:
        sums = []
        for parts in steps:
            laps.clear()
            subject.update.gradients(0, parts)
            sums.append(sum(laps))
    return median(sums)


@contextmanager
def _stopwatch(subject: Subject, *modules: nn.Module) -> Iterator[list[float]]:
    """Collect the seconds of every call of these modules; the device is waited for before and after each."""
    began: list[float] = []
    laps: list[float] = []
    handles = [module.register_forward_pre_hook(lambda *_: began.append(_now(subject))) for module in modules]
    handles += [module.register_forward_hook(lambda *_: laps.append(_now(subject) - began.pop())) for module in modules]
    try:
        yield laps
    finally:
        for handle in handles:
            handle.remove()


def _now(subject: Subject) -> float:
    if subject.device.type == "cuda":
        torch.cuda.synchronize(subject.device)
    return time.perf_counter()


def _faster_loading(ratio: float, workers: int) -> str:
    cores = os.cpu_count() or 1
    wanted = max(workers + 1, math.ceil(ratio * max(workers, 1)))
    if workers >= cores:
        return "all cores load images already: store them smaller, or take off augmentations"
    return f"raise train.workers, to about {min(wanted, cores)} (this machine has {cores} cores)"


def _memory(subject: Subject) -> Finding:
    if subject.device.type != "cuda":
        peak = _resident_peak()
        return ok(f"{peak / 2**30:.1f} GiB of memory at most, all checks included", peak_bytes=peak)
    peak = torch.cuda.max_memory_allocated(subject.device)
    total = torch.cuda.get_device_properties(subject.device).total_memory
    text = f"{peak / 2**30:.1f} of the GPU's {total / 2**30:.0f} GiB in a step"
    if peak > FULL * total:
        return warning(
            text,
            "larger images or more regions may not fit: lower train.batch_size, or train.amp=bf16",
            peak_bytes=peak,
        )
    return ok(text, peak_bytes=peak)


def _resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _estimate(subject: Subject, seconds: float) -> Finding:
    """How long the whole run will take, from the `seconds` of a step."""
    train, steps = subject.config.train, subject.steps_per_epoch
    total = train.epochs * steps * seconds
    text = f"{steps} steps an epoch, {_duration(steps * seconds)}; {train.epochs} epochs {_duration(total)}"
    if subject.evaluation is not None and subject.val_set is not None:
        count = math.ceil(train.epochs / train.eval_every)  # the last epoch always has one
        each = subject.evaluation * len(subject.val_set)
        total += count * each
        text += f"; {count} evaluations of {_duration(each)}"
    return ok(f"{text}: about {_duration(total)} in all", seconds=total, steps_per_epoch=steps)


def _duration(seconds: float) -> str:
    for limit, unit, name in ((1, 0.001, "ms"), (120, 1, "s"), (7200, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.3g} days"
