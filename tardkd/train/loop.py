"""The training loop: epochs of steps, a log, an evaluation and a checkpoint after each.

A checkpoint may also be written after any step. Whatever ended a run, it goes on from there as if it had not been
ended: all that is random depends on the seed, the epoch or step and the image alone, the learning rate on the step.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import nn

from tardkd.data.loader import aspect_groups, build_loader
from tardkd.device import HostCopy
from tardkd.train import checkpoint
from tardkd.train.build import build_dataset, build_distiller, start_from, stored_config
from tardkd.train.config import Config, ConfigError, Teacher
from tardkd.train.distributed import Processes, join_processes
from tardkd.train.evaluate import evaluate
from tardkd.train.interrupt import Interrupted, Termination
from tardkd.train.logs import NoLog, RunLog
from tardkd.train.optim import learning_rate
from tardkd.train.update import Numbers, Part, Update

OUTPUTS = ("last.pt", "previous.pt", "best.pt", "failed*.pt", "train.csv", "eval.csv", "config.yaml", "tensorboard")
# What may differ on resume, because no weight depends on it but for rounding.
FREE_ON_RESUME = {
    "output",
    "data.root",
    "train.threads",
    "train.workers",
    "train.log_every",
    "train.save_every",
    "train.device",
    "train.accumulate",
    "train.on_non_finite",
    "student.weights",
    "student.new_head",
    "student.backbone_weights",
}  # the checkpoint has them all
MOVABLE = re.compile(r"teacher(\.\d+)?\.weights")  # free too, but must hold what they held
LATE_DEVICES = {"cuda"}  # go on working when the host has queued a step
MOST_SKIPS = 10  # in a row, of steps with a loss or gradient that is not finite


class NonFiniteLoss(RuntimeError):
    """A loss term or the gradient became infinite or NaN; the message names it, the step and the images."""


@dataclass
class Progress:
    """How far a run has come; part of its checkpoints."""

    epoch: int = 0  # finished
    batch: int = 0  # done of the one after
    step: int = 0  # done of all
    best_ap: float = -1.0
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """What a finished run has reached: the last epoch's metrics, the best AP, and where the files are."""

    metrics: dict[str, Any]
    best_ap: float
    folder: Path
    seconds: float


@dataclass
class Step:
    """What is known of a step; of one on a GPU, which is not waited for, the numbers when the next has been queued."""

    number: int  # from 1
    epoch: int  # from 1
    rate: float
    parts: Sequence[Part]
    losses: list[str] = field(default_factory=list)  # their names, among those of the numbers
    numbers: Numbers | None = None
    values: dict[str, float] | None = None  # the numbers once they have been looked at
    norm: HostCopy | None = None
    seconds: float = 0.0
    teachers_seconds: float = 0.0  # of these; 0 on a GPU, where nobody waits for it to end

    def __str__(self) -> str:
        images = [str(target["image_id"]) for _, targets in self.parts for target in targets]
        return f"step {self.number}, images {', '.join(images)}"


def train(
    config: Config, *, resume: bool = False, overwrite: bool = False, console: Console | None = None, label: str = ""
) -> Result:
    """Train as `config` says, into ``config.output``; `resume` goes on from its ``last.pt``, exactly.

    Under torchrun all processes call this; the first one writes.
    """
    began = time.perf_counter()
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    with join_processes(config.train.device) as processes:
        run = Run(config, processes, resume=resume, overwrite=overwrite)
        with run.open_log(console, label) as log, Termination() as termination:
            run.train(log, termination)
    return Result(run.progress.metrics, run.progress.best_ap, run.folder, time.perf_counter() - began)


class Run:
    """One training: its parts, and how far it has come."""

    def __init__(self, config: Config, processes: Processes, *, resume: bool, overwrite: bool) -> None:
        self.config, self.processes, self.folder = config, processes, Path(config.output)
        state = resumed_state(self.folder, config) if resume else None
        self.train_set, self.val_set = build_dataset(config, "train", augment=True), build_dataset(config, "val")
        check_classes("data.train", self.train_set.class_names, "data.val", self.val_set.class_names)
        if all(annotation["iscrowd"] for annotation in self.val_set.coco.dataset["annotations"]):
            raise ConfigError("data.val holds no object, so nothing can be evaluated")
        begin = config if state is None else start_from(config, None)  # the files it began from may be gone
        self.distiller = build_distiller(begin, self.train_set.class_names).to(processes.device)
        if config.train.channels_last:
            self.distiller.to(memory_format=torch.channels_last)
        for section, teacher in zip(config.teachers.values(), self.distiller.teachers):
            ready_teacher(config, section, teacher.to(processes.device))
        self.fingerprints = [checkpoint.fingerprint(teacher.state_dict()) for teacher in self.distiller.teachers]
        self.update = Update(config, self.distiller, processes)
        self.steps_per_epoch = len(self.batches(epoch=0)) // config.train.accumulate
        self.distiller.start(config.train.epochs, self.steps_per_epoch)
        self.progress, self.resumed = Progress(), state is not None
        self._skipped = 0  # steps in a row
        self._asked_to_end = False  # any of several processes, as all of them have learnt
        if state is not None:
            self._restore(state)
        elif processes.is_first:
            _claim(self.folder, overwrite)
            text = yaml.safe_dump(config.plain(), sort_keys=False)
            (self.folder / "config.yaml").write_text(text, encoding="utf-8")
        processes.gather(None)  # nobody goes on before there is a folder

    def batches(self, *, epoch: int | None = None, first_step: int = 0) -> Iterable[Part]:
        """This process's parts of the training batches of `epoch`, or its share of the validation images."""
        dataset = self.val_set if epoch is None else self.train_set
        first_batch = first_step * self.config.train.accumulate
        return build_batches(self.config, dataset, epoch=epoch, first_batch=first_batch, processes=self.processes)

    def open_log(self, console: Console | None, label: str) -> AbstractContextManager[RunLog | NoLog]:
        if not self.processes.is_first:
            return nullcontext(NoLog())
        train = self.config.train
        return RunLog(
            self.folder,
            epochs=train.epochs,
            steps_per_epoch=self.steps_per_epoch,
            label=label,
            console=console,
            resumed=(self.progress.epoch, self.progress.step) if self.resumed else None,
            log_every=train.log_every,
        )

    def train(self, log: RunLog | NoLog, termination: Termination) -> None:
        settings, progress = self.config.train, self.progress

        def end() -> None:
            raise Interrupted(f"ended by SIGTERM after step {progress.step}, which {self.folder / 'last.pt'} holds")

        def unless_asked(batches: Iterable[Part]) -> Iterator[Part]:
            for batch in batches:
                if termination.requested:
                    end()
                yield batch

        for line in self.distiller.describe():
            log.say(line)
        while progress.epoch < settings.epochs:
            for asked_to_end in self.steps(log, termination):
                self.save("last.pt")
                if asked_to_end:
                    end()
            due = (progress.epoch + 1) % settings.eval_every == 0 or progress.epoch + 1 == settings.epochs
            if due:
                self.save("last.pt")  # an evaluation may take long, or fail
                self.processes.copy_from_first(self.update.evaluated.buffers())  # batch statistics differ, till here
                metrics = evaluate(self.update.evaluated, unless_asked(self.batches()), self.val_set, self.processes)
            progress.epoch, progress.batch = progress.epoch + 1, 0
            best = False
            if due:
                best = metrics["AP"] > progress.best_ap
                progress.metrics, progress.best_ap = metrics, max(metrics["AP"], progress.best_ap)
                log.evaluation(progress.epoch, progress.step, metrics, best=best)
            if best:
                self.save("best.pt")
            self.save("last.pt")
            if any(self.processes.gather(termination.requested)):
                end()

    def steps(self, log: RunLog | NoLog, termination: Termination) -> Iterator[bool]:
        """What is left of an epoch; yields after a step that is to be saved: whether the run is to end."""
        config, progress, update = self.config, self.progress, self.update
        skip, every = config.train.on_non_finite == "skip", config.train.save_every
        self.late = self.processes.device.type in LATE_DEVICES and not skip
        waiting: Step | None = None
        self.distiller.train()
        loader = iter(self.batches(epoch=progress.epoch, first_step=progress.batch))
        tick = time.perf_counter()
        for parts in zip(*[loader] * config.train.accumulate):
            rate = learning_rate(config.optimizer, progress.step, self.steps_per_epoch, config.train.epochs)
            self.distiller.set_progress(progress.epoch, progress.batch)
            step = Step(progress.step + 1, progress.epoch + 1, rate, parts)
            try:
                before = self.teachers_seconds()
                losses, stats = update.gradients(progress.step, parts)
                step.teachers_seconds = self.teachers_seconds() - before
                stats["asked_to_end"] = torch.full_like(losses["loss"], termination.requested)
                step.losses, step.numbers = list(losses), Numbers({**losses, **stats}, self.processes)
                if not self.late:
                    self.look_at(step)
                step.norm = HostCopy(update.clip())
                if not self.late:
                    self.look_at_norm(step)
            except FloatingPointError as error:
                blamed = step if waiting is None else waiting  # what was not waited for is of the step before
                raise NonFiniteLoss(f"{error} at {blamed}; {self._keep(blamed)}") from None
            except NonFiniteLoss as error:
                self._skipped += 1
                if not skip or self._skipped == MOST_SKIPS:
                    raise
                log.say(f"skipped: {error}")
                update.drop()
                step.norm = HostCopy(torch.tensor(math.nan))
            else:
                self._skipped = 0
                update.apply(rate)
            progress.batch, progress.step = progress.batch + 1, progress.step + 1
            now = time.perf_counter()
            step.seconds, tick = now - tick, now
            if waiting is not None:
                self.write(waiting, log)
            waiting = step
            if not self.late:
                waiting = self.write(waiting, log)
            asked_to_end = self._asked_to_end if self.processes.count > 1 else termination.requested
            if asked_to_end or (every is not None and progress.step % every == 0):
                if waiting is not None:
                    waiting = self.write_last(waiting, log)
                yield asked_to_end
                tick = time.perf_counter()
        if waiting is not None:
            self.write_last(waiting, log)

    def teachers_seconds(self) -> float:
        """That the teachers have taken so far, where it is known."""
        on_cpu = self.processes.device.type == "cpu"
        return sum(teacher.seconds for teacher in self.distiller.frozen_teachers) if on_cpu else 0.0

    def look_at(self, step: Step) -> None:
        """Takes the step's numbers; raises NonFiniteLoss naming the losses that are none, and on which images."""
        step.values = step.numbers.mean()
        self._asked_to_end = step.values.pop("asked_to_end") > 0
        if all(math.isfinite(step.values[name]) for name in step.losses):
            return
        own = step.numbers.own()
        self._refuse(step, [f"{name} is {own[name]}" for name in step.losses if not math.isfinite(own[name])])

    def look_at_norm(self, step: Step) -> None:
        """The gradient may be infinite where no loss is; raises NonFiniteLoss in all processes, for they share it."""
        norm = step.norm.tolist()
        if not (math.isfinite(norm) or self.update.expects_overflow):
            self._refuse(step, [f"the gradient's norm is {norm}"])

    def _refuse(self, step: Step, broken: list[str]) -> None:
        described = f"{'; '.join(broken)} at {step}; {self._keep(step)}" if broken else None
        raise NonFiniteLoss("; ".join(filter(None, self.processes.gather(described))))

    def write(self, step: Step, log: RunLog | NoLog) -> None:
        if step.values is None:
            self.look_at(step)
            self.look_at_norm(step)
        losses = {name: step.values.pop(name) for name in step.losses}
        values = {"lr": step.rate, **losses, "grad_norm": step.norm.tolist(), **step.values}
        images = self.processes.count * sum(len(images) for images, _ in step.parts)
        log.step(
            step.epoch, step.number, values, images=images, seconds=step.seconds, teachers_seconds=step.teachers_seconds
        )

    def write_last(self, step: Step, log: RunLog | NoLog) -> None:
        """The same for a step that no other follows at once."""
        self.write(step, log)
        try:
            self.distiller.settle()
        except FloatingPointError as error:
            raise NonFiniteLoss(f"{error} at {step}; {self._keep(step)}") from None

    def save(self, name: str) -> None:
        if self.processes.is_first:
            checkpoint.save(
                self.folder / name,
                {
                    "model": self.update.evaluated.state_dict(),
                    "classes": self.train_set.class_names,
                    "config": self.config.plain(),
                    "teachers": self.fingerprints,
                    "task": self.distiller.task_state(),
                    **self.update.state_dict(),
                    **asdict(self.progress),
                },
                previous=self.folder / checkpoint.PREVIOUS if name == checkpoint.LAST else None,
            )

    def _keep(self, step: Step) -> str:
        """Saves the images of a step that failed, to be looked at; says where."""
        path = self.folder / ("failed.pt" if self.processes.is_first else f"failed-{self.processes.rank}.pt")
        state = {"step": step.number, "epoch": step.epoch, "parts": [list(part) for part in step.parts]}
        if not self.late:  # else the weights have moved since
            state["model"] = self.distiller.student.state_dict()
        checkpoint.save(path, state)
        return f"{path} holds these images; nothing else of that step is saved"

    def _restore(self, state: dict[str, Any]) -> None:
        for (key, section), now, before in zip(
            self.config.teachers.items(), self.fingerprints, state.get("teachers", self.fingerprints)
        ):
            if now != before:
                raise ConfigError(f"{key}.weights {section.weights} holds other weights than the run began with")
        self.update.load_state_dict(state["model"], state)
        self.distiller.load_task_state(state["task"])
        self.progress = Progress(**{item.name: state[item.name] for item in fields(Progress)})


def ready_teacher(config: Config, section: Teacher, teacher: nn.Module) -> None:
    if config.train.channels_last:
        teacher.to(memory_format=torch.channels_last)
    if section.compile:
        teacher.backbone.compile(dynamic=True)


def build_batches(
    config: Config, dataset: Any, *, epoch: int | None = None, first_batch: int = 0, processes: Processes | None = None
) -> Iterable[Part]:
    """This process's share of the training batches of `epoch` from `first_batch` on, or of the data set in order."""
    train, processes = config.train, processes or Processes()
    if train.batch_size % (processes.count * train.accumulate):
        raise ConfigError(
            f"train.batch_size {train.batch_size} does not divide into {processes.count} processes times "
            f"train.accumulate {train.accumulate}"
        )
    groups = aspect_groups(dataset.sizes) if epoch is not None and train.group_by_aspect else None
    return build_loader(
        dataset,
        groups=groups,
        batch_size=train.batch_size,
        shuffle=epoch is not None,
        seed=train.seed,
        epoch=epoch or 0,
        workers=train.workers,
        first_batch=first_batch,
        rank=processes.rank,
        processes=processes.count,
        parts=train.accumulate,
        pin_memory=processes.device.type == "cuda",
    )


def _claim(folder: Path, overwrite: bool) -> None:
    """Make the output folder, refusing one in use; `overwrite` removes an earlier run's files and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {folder} is a file, not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    used = sorted(path for name in OUTPUTS for path in folder.glob(name))
    if used and not overwrite:
        raise ConfigError(
            f"output folder {folder} is in use (it holds {', '.join(path.name for path in used)}); "
            "--resume continues that run, --overwrite starts again, or choose another output="
        )
    for path in used:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def resumed_state(folder: Path, config: Config) -> dict[str, Any]:
    """The checkpoint to go on from; one of a different run is refused, naming the keys that differ."""
    state = checkpoint.load_last(folder)
    path = folder / checkpoint.LAST
    before = _flat(stored_config(state, path).plain())  # with today's defaults for keys that it did not know
    now = _flat(config.plain())
    changed = [
        f"{key} ({before.get(key)!r} -> {now.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in FREE_ON_RESUME and not MOVABLE.fullmatch(key)
    ]
    if changed:
        raise ConfigError(f"{path} belongs to a run with other settings: {', '.join(changed)}")
    return state


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(place): item for place, item in enumerate(value)}
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def check_classes(left: str, left_names: list[str], right: str, right_names: list[str]) -> None:
    if left_names != right_names:
        raise ConfigError(f"{left} has the classes {left_names}, {right} has {right_names}")
