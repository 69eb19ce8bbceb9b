"""Checks of what the recipe says by itself: output folder, device, optimizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from tardkd.distill.findings import Finding, ok, problem, warning
from tardkd.train.checkpoint import CheckpointError
from tardkd.train.config import ConfigError, load_config
from tardkd.train.distributed import pick_device
from tardkd.train.folder import outputs_in
from tardkd.train.resume import resumed_state

from .subject import Subject

RULE = 0.02, 16  # learning rate and batch size of SGD in most published detectors
FAR = 4.0  # times that rule, or less than one in so many


def check_configuration(subject: Subject, path: str, overrides: list[str], role: str | None) -> Iterator[Finding]:
    config = load_config(path, overrides)
    subject.config = config = config.for_role(role) if role else config
    what = "a student with a teacher" if config.distill.enabled else "a detector alone"
    yield ok(
        f"{path}{f' as {role}' if role else ''}: {what}, {config.train.epochs} epochs in batches of "
        f"{config.train.batch_size}"
    )


def check_output(subject: Subject) -> Iterator[Finding]:
    folder = Path(subject.config.output)
    if folder.exists() and not folder.is_dir():
        yield problem(f"output {folder} is a file, not a folder", "choose another output=")
        return
    used = [path.name for path in outputs_in(folder)]
    if not used:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if os.access(there, os.W_OK):
            yield ok(f"{folder} is free")
        else:
            yield problem(f"{there} is not writable, so that {folder} cannot be made", "choose another output=")
        return
    try:
        state = resumed_state(folder, subject.config)
    except (ConfigError, CheckpointError) as error:
        yield problem(
            f"{folder} is in use (it holds {', '.join(used)}) and cannot be resumed: {error}",
            "choose another output=, or --overwrite to remove that run",
        )
        return
    yield warning(
        f"{folder} holds this run, {state['epoch']} of {subject.config.train.epochs} epochs done",
        "train with --resume to go on from there, with --overwrite to start again",
    )


def check_device(subject: Subject) -> Iterator[Finding]:
    train = subject.config.train
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    try:
        subject.device = pick_device(train.device)
    except ConfigError as error:
        on_cpu = train.model_copy(update={"device": "cpu"})
        subject.config = subject.config.model_copy(update={"train": on_cpu})
        yield problem(
            f"{error}; all that follows is measured on the CPU",
            "train.device=auto takes what there is; does torch.cuda.is_available() say why?",
        )
        return
    if subject.device.type == "cuda":
        memory = torch.cuda.get_device_properties(subject.device).total_memory
        yield ok(f"{torch.cuda.get_device_name(subject.device)}, {memory / 2**30:.0f} GiB")
    else:
        yield ok(f"the CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores")


def check_optimizer(subject: Subject) -> Iterator[Finding]:
    settings, train = subject.config.optimizer, subject.config.train
    rate, batch = RULE
    expected = rate * train.batch_size / batch
    ratio = settings.lr / expected
    text = f"{settings.kind}, learning rate {settings.lr:g} for batches of {train.batch_size}"
    if settings.kind == "sgd" and not 1 / FAR <= ratio <= FAR:
        yield warning(
            f"{text}: {_times(ratio)} what linear scaling from {rate:g} for {batch} gives",
            f"a hint, not a rule: if the loss {'grows' if ratio > 1 else 'hardly falls'}, try "
            f"optimizer.lr={expected:.2g}",
            ratio=ratio,
        )
    else:
        yield ok(text)
    late = [epoch for epoch in settings.milestones if epoch >= train.epochs]
    if late:
        yield warning(
            f"milestones {', '.join(map(str, late))} are not reached in {train.epochs} epochs",
            "set optimizer.milestones within train.epochs",
        )
    if subject.train_set is not None:
        steps = train.epochs * subject.steps_per_epoch
        if settings.warmup > steps / 4:
            yield warning(
                f"{settings.warmup} steps of warm-up in a run of {steps}",
                f"a twentieth of the run would be optimizer.warmup={max(1, steps // 20)}",
            )


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio > 1 else f"1/{1 / ratio:.1f} of"
