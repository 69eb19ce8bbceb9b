"""The training loop: epochs of steps, with an evaluation and a checkpoint after each.

A checkpoint may also be written after any step. Whatever ended a run, it goes on from there as if it had not been
ended: all that is random depends on the seed, the epoch or step and the image alone, the learning rate on the step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tardkd.distill import Distiller
from tardkd.files import FolderLock
from tardkd.train import checkpoint, late
from tardkd.train.batches import Part, build_batches, by_step
from tardkd.train.blame import Blame, NonFiniteLoss
from tardkd.train.build import (
    build_dataset,
    build_distiller,
    check_classes,
    fit_images,
    place,
    start_from,
    stored_config,
)
from tardkd.train.config import Config, ConfigError
from tardkd.train.distributed import Processes, join_processes
from tardkd.train.evaluate import evaluate
from tardkd.train.folder import claim_for_run, reclaim, write_config
from tardkd.train.interrupt import Interrupted, Termination
from tardkd.train.late import Readings
from tardkd.train.logs import NoLog, OnLog, RunLog
from tardkd.train.optim import learning_rate
from tardkd.train.resume import check_data, check_teachers, lengthened, restoring, resumed_state
from tardkd.train.skip import Skipping
from tardkd.train.steps import Step, Stopwatch
from tardkd.train.update import Update


@dataclass
class Progress:
    """How far a run has come; part of its checkpoints."""

    epoch: int = 0  # finished
    batch: int = 0  # steps done of the epoch after these
    step: int = 0  # done in all
    best_ap: float = -1.0
    metrics: dict[str, Any] = field(default_factory=dict)  # of the last evaluation


@dataclass
class Result:
    """What a finished run has reached: the last epoch's metrics, the best AP, and where the files are."""

    metrics: dict[str, Any]
    best_ap: float
    folder: Path
    seconds: float


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
    label: str = "",
    on_log: OnLog | None = None,
) -> Result:
    """Train as `config` says, into ``config.output``.

    Under torchrun all processes call this; the first one writes.

    Args:
        resume: go on from the folder's ``last.pt``, exactly.
        overwrite: remove an earlier run from the folder.
        console: where to say how it goes; ``Console(quiet=True)`` says nothing.
        label: what lines and table call the run.
        on_log: called in the first process with the numbers of every step and of every evaluation, as a row of
            ``train.csv`` or ``eval.csv`` has them: both have "epoch" and "step" beside the others, and None stands for
            what an evaluation could not measure.
    """
    began = time.perf_counter()
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    with join_processes(config.train.device) as processes, FolderLock(Path(config.output)) as lock:
        run = Run(config, processes, lock, resume=resume, overwrite=overwrite)
        with run.open_log(console, label, on_log) as log, Termination(is_alone=processes.count == 1) as termination:
            run.train(log, termination)
    return Result(run.progress.metrics, run.progress.best_ap, run.folder, time.perf_counter() - began)


class Run:
    """One training: its parts, and how far it has come."""

    def __init__(
        self, config: Config, processes: Processes, lock: FolderLock, *, resume: bool, overwrite: bool
    ) -> None:
        self.config, self.processes, self.folder = config, processes, Path(config.output)
        if resume and processes.is_first:
            reclaim(self.folder, lock)
        state = resumed_state(self.folder, config) if resume else None
        self.train_set, self.val_set = build_dataset(config, "train", augment=True), build_dataset(config, "val")
        self._check_data()
        self.data = {"train": self.train_set.fingerprint(), "val": self.val_set.fingerprint()}
        self.distiller = self._build_distiller(resumed=state is not None)
        self._check_sizes()
        self.fingerprints = [checkpoint.fingerprint(teacher.state_dict()) for teacher in self.distiller.teachers]
        self.update = Update(config, self.distiller, processes)
        self.steps_per_epoch = len(self.batches(epoch=0)) // config.train.accumulate
        self.distiller.start(config.train.epochs, self.steps_per_epoch)
        self.progress, self.resumed = Progress(), state is not None
        self.lengthened: str | None = None  # what that means, where the run goes on for more epochs
        if state is not None:
            self._restore(state)
        elif processes.is_first:
            claim_for_run(self.folder, overwrite=overwrite, lock=lock)
        if processes.is_first:
            write_config(self.folder / "config.yaml", config)
        processes.gather(None)  # nobody goes on before there is a folder

    # ---- the loop

    def train(self, log: RunLog | NoLog, termination: Termination) -> None:
        """All epochs that are left, each with its evaluation and its checkpoints.

        Raises:
            NonFiniteLoss: a step was not finite.
            Interrupted: the run was told to end, and has saved what it had.
        """
        is_late = self.processes.device.type in late.LATE_DEVICES and not self._may_skip
        blame = Blame(self.folder, self.distiller.student, self.processes, late=is_late)
        readings = Readings(self.update, blame, log, termination, late=is_late)
        skipping = Skipping(self.update, log, allowed=self._may_skip)
        for line in filter(None, (self.lengthened, *self.distiller.describe())):
            log.say(line)
        while self.progress.epoch < self.config.train.epochs:
            for asked_to_end in self.steps(readings, skipping):
                self.save(checkpoint.LAST)
                if asked_to_end:
                    self._end(termination)
            self.finish_epoch(log, termination)
            self.save(checkpoint.LAST)
            if any(self.processes.gather(termination.requested)):
                self._end(termination)

    def steps(self, readings: Readings, skipping: Skipping) -> Iterator[bool]:
        """The rest of an epoch. After a step that is to be saved it yields: whether the run is to end with it."""
        progress, update, settings = self.progress, self.update, self.config.train
        self.distiller.train()
        batches = iter(self.batches(epoch=progress.epoch, first_step=progress.batch))
        watch = Stopwatch(self.distiller, self.processes.device)
        for parts in by_step(batches, settings.accumulate):
            step = self._begin_step(parts)
            with readings.blaming(step):
                losses, stats = update.gradients(progress.step, parts)
            try:
                readings.take(step, losses, stats)
                readings.take_norm(step, update.clip())
            except NonFiniteLoss as error:
                skipping.skip(step, error)
            else:
                skipping.go_on()
                update.apply(step.rate)
            progress.batch, progress.step = progress.batch + 1, progress.step + 1
            step.seconds, step.teachers_seconds = watch.lap()
            readings.write(step)
            asked_to_end = readings.asked_to_end
            if asked_to_end or (settings.save_every is not None and progress.step % settings.save_every == 0):
                readings.settle()
                yield asked_to_end
                watch.restart()
        readings.settle()

    def finish_epoch(self, log: RunLog | NoLog, termination: Termination) -> None:
        """Evaluate where that is due, and keep the best student."""
        progress, settings = self.progress, self.config.train
        finished = progress.epoch + 1
        is_due = finished % settings.eval_every == 0 or finished == settings.epochs
        metrics = self.evaluate(termination) if is_due else None
        progress.epoch, progress.batch = finished, 0
        if metrics is None:
            return
        is_best = metrics["AP"] > progress.best_ap
        progress.metrics, progress.best_ap = metrics, max(metrics["AP"], progress.best_ap)
        log.evaluation(progress.epoch, progress.step, metrics, best=is_best)
        if is_best:
            self.save(checkpoint.BEST)

    def evaluate(self, termination: Termination) -> dict[str, Any]:
        """The student's metrics on the validation images."""
        self.save(checkpoint.LAST)  # an evaluation may take long, or fail
        model = self.update.evaluated
        self.processes.copy_from_first(model.buffers())  # each process has batch statistics of its own until here
        batches = self._until_asked_to_end(self.batches(), termination)
        return evaluate(model, batches, self.val_set, self.processes)

    def save(self, name: str) -> None:
        """Write a checkpoint of that name into the run's folder."""
        if not self.processes.is_first:
            return
        state = {
            "model": self.update.evaluated.state_dict(),
            "classes": self.train_set.class_names,
            "config": self.config.plain(),
            "teachers": self.fingerprints,
            "data": self.data,
            "task": self.distiller.task_state(),
            **self.update.state_dict(),
            **asdict(self.progress),
        }
        previous = self.folder / checkpoint.PREVIOUS if name == checkpoint.LAST else None
        checkpoint.save(self.folder / name, state, previous=previous)

    # ---- its parts

    def batches(self, *, epoch: int | None = None, first_step: int = 0) -> Iterable[Part]:
        """This process's parts of the training batches of `epoch`, or its share of the validation images."""
        dataset = self.val_set if epoch is None else self.train_set
        first_batch = first_step * self.config.train.accumulate
        return build_batches(self.config, dataset, epoch=epoch, first_batch=first_batch, processes=self.processes)

    def open_log(
        self, console: Console | None, label: str, on_log: OnLog | None = None
    ) -> AbstractContextManager[RunLog | NoLog]:
        """The log that goes on after what the run has logged before it was resumed."""
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
            on_log=on_log,
        )

    @property
    def _may_skip(self) -> bool:
        return self.config.train.on_non_finite == "skip"

    def _begin_step(self, parts: tuple[Part, ...]) -> Step:
        """The next step, of which the schedules of the rate and of the distillation are told."""
        config, progress = self.config, self.progress
        rate = learning_rate(config.optimizer, progress.step, self.steps_per_epoch, config.train.epochs)
        self.distiller.set_progress(progress.epoch, progress.batch)
        return Step(progress.step + 1, progress.epoch + 1, rate, parts)

    def _until_asked_to_end(self, batches: Iterable[Part], termination: Termination) -> Iterator[Part]:
        for batch in batches:
            if termination.requested:
                self._end(termination)
            yield batch

    def _end(self, termination: Termination) -> None:
        last = self.folder / checkpoint.LAST
        raise Interrupted(
            f"ended by {termination.name} after step {self.progress.step}, which {last} holds; "
            "--resume goes on from there",
            termination.number or signal.SIGTERM,
        )

    def _check_data(self) -> None:
        check_classes("data.train", self.train_set.class_names, "data.val", self.val_set.class_names)
        if all(annotation["iscrowd"] for annotation in self.val_set.coco.dataset["annotations"]):
            raise ConfigError("data.val holds no object, so nothing can be evaluated")

    def _check_sizes(self) -> None:
        """Images that are too thin for one of the models count as bad ones; a crop makes them thinner still."""
        crop = 0.3 if self.config.augment.iou_crop else 1.0
        fit_images(self.train_set, self.distiller.student, *self.distiller.teachers, crop=crop)
        fit_images(self.val_set, self.distiller.student)

    def _build_distiller(self, *, resumed: bool) -> Distiller:
        """A resumed run needs none of the files that the student began from: they may be gone."""
        begin = start_from(self.config, None) if resumed else self.config
        distiller = build_distiller(begin, self.train_set.class_names)
        place(self.config, distiller, self.processes.device)
        return distiller

    def _restore(self, state: dict[str, Any]) -> None:
        path, train = self.folder / checkpoint.LAST, self.config.train
        check_classes(str(path), state["classes"], "data.train", self.train_set.class_names)
        check_teachers(self.config, self.fingerprints, state.get("teachers", self.fingerprints))
        check_data(self.data, state.get("data", self.data), self.folder)
        with restoring(path):
            self.update.load_state_dict(state["model"], state)
            self.distiller.load_task_state(state["task"])
        self.progress = progress = Progress(**{item.name: state[item.name] for item in fields(Progress)})
        if progress.step != progress.epoch * self.steps_per_epoch + progress.batch:
            raise ConfigError(
                f"{path} belongs to a run with other data: it has done {progress.step} steps, {progress.epoch} epochs "
                f"and {progress.batch} of the next one, which has {self.steps_per_epoch} now"
            )
        self.distiller.start(train.epochs, self.steps_per_epoch)  # the state has the length that the run had before
        before = stored_config(state, path)
        self.lengthened = lengthened(self.config, before, self.steps_per_epoch, progress.step)
