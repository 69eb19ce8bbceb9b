"""How long a step takes and of what, how much memory, and what that makes of the whole run."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from tardkd.train.loop import build_batches
from tardkd.train.optim import build_optimizer, set_learning_rate

from .report import Finding, ok, warning
from .subject import Subject

STEPS = 3
FULL = 0.9  # share of a GPU's memory


def check_speed(subject: Subject) -> Iterator[Finding]:
    config, distiller = subject.config, subject.distiller
    distiller.train()
    batches, loading = _load(subject)
    student = _seconds(subject, batches, lambda batch: _backward(subject, distiller.student, batch))
    teacher = _teacher_seconds(subject, batches) if distiller.teachers else 0.0
    optimizer = build_optimizer(config.optimizer, distiller)
    set_learning_rate(optimizer, 0.0)

    def whole_step(batch: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        _backward(subject, distiller, batch)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm or math.inf)
        optimizer.step()

    if subject.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(subject.device)
    step = _seconds(subject, batches, whole_step)
    rest = max(0.0, step - student - teacher)  # 0 where a GPU runs the teacher beside the student
    text = f"the student {_duration(student)}"
    if teacher:
        compiled = " (not compiled here)" if any(one.compile for one in config.teachers.values()) else ""
        text += f", the teacher {_duration(teacher)}{compiled}, the distillation and"
    else:
        text += ","
    workers = config.train.workers
    what = "a step" if config.train.accumulate == 1 else "a part of a step"
    found = (
        f"{what} takes {_duration(step)}: {text} the rest {_duration(rest)}; loading its images "
        f"{_duration(loading)} with {workers} workers"
    )
    numbers = {"step": step, "loading": loading, "student": student, "teacher": teacher, "rest": rest}
    if loading > step:
        yield warning(found, _faster_loading(loading / step, workers), **numbers)
    else:
        yield ok(found, **numbers)
    yield _memory(subject)
    yield _estimate(subject, max(step, loading) if workers else step + loading)


def _load(subject: Subject) -> tuple[list[Any], float]:
    """A few batches on the device, and the seconds that each batch takes to load."""
    workers = subject.config.train.workers
    wanted = 1 + max(STEPS, 4 * workers)  # workers have some ready before they are asked
    batches, waits = [], []
    tick = time.perf_counter()
    for batch in build_batches(subject.config, subject.train_set, epoch=0):
        waits.append(time.perf_counter() - tick)
        if len(batches) < STEPS:
            batches.append(subject.to_device(batch))
        if len(waits) == wanted:
            break
        tick = time.perf_counter()
    rest = waits[1:] or waits  # the first one also starts the workers
    return batches, mean(rest) if workers else median(rest)


def _backward(subject: Subject, model: nn.Module, batch: Any) -> None:
    with subject.autocast():
        losses = model(*batch)
    sum(losses.values()).backward()


def _seconds(subject: Subject, batches: list[Any], work: Callable[[Any], None]) -> float:
    """The median over the batches, after one run to warm up."""
    work(batches[0])
    found = []
    for batch in batches:
        began = _now(subject)
        work(batch)
        found.append(_now(subject) - began)
    return median(found)


def _teacher_seconds(subject: Subject, batches: list[Any]) -> float:
    """In what the distillation asks of it: its trunk, and its box head on the shared regions."""
    modules = [
        module
        for teacher in subject.distiller.teachers
        for module in (teacher.backbone, teacher.roi_heads.box_head, teacher.roi_heads.box_predictor)
    ]
    with _stopwatch(subject, *modules) as laps:
        found = []
        for batch in batches:
            laps.clear()
            _backward(subject, subject.distiller, batch)
            found.append(sum(laps))
    return median(found)


@contextmanager
def _stopwatch(subject: Subject, *modules: nn.Module) -> Iterator[list[float]]:
    """The seconds of every call of these modules. It waits for the device before and after."""
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
    """Of the whole run, from `seconds` a step."""
    train = subject.config.train
    parts = len(build_batches(subject.config, subject.train_set, epoch=0))
    steps = parts // train.accumulate
    total = train.epochs * parts * seconds
    text = f"{steps} steps an epoch, {_duration(parts * seconds)}; {train.epochs} epochs {_duration(total)}"
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
