"""The training loop: epochs of steps, a log, an evaluation and a checkpoint after each.

A checkpoint may also be written after any step. Whatever ended a run, it goes on from there as if it had not been ended:
the order of the batches and the views of the images depend on seed and epoch alone, the learning rate on the step.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor, nn

from tardkd.data.loader import build_loader
from tardkd.distill.device import HostCopy
from tardkd.train import checkpoint
from tardkd.train.build import build_dataset, build_distiller, pick_device
from tardkd.train.config import Config, ConfigError
from tardkd.train.evaluate import evaluate
from tardkd.train.interrupt import Interrupted, Termination
from tardkd.train.logs import RunLog
from tardkd.train.optim import build_optimizer, learning_rate, set_learning_rate

OUTPUTS = ("last.pt", "best.pt", "train.csv", "eval.csv", "config.yaml", "tensorboard")
# What may differ on resume, because no weight depends on it.
FREE_ON_RESUME = {"output", "train.threads", "train.workers", "train.log_every", "train.save_every", "train.device"}


LATE_DEVICES = {"cuda"}  # go on working when the host has queued a step


class NonFiniteLoss(RuntimeError):
    """A loss term became infinite or NaN; the message names it, the step and the images."""


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


def train(config: Config, *, resume: bool = False, overwrite: bool = False, console: Console | None = None,
          label: str = "") -> Result:
    """Train as `config` says, into ``config.output``; `resume` goes on from its ``last.pt``, exactly."""
    began = time.perf_counter()
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    device = pick_device(config.train.device)
    folder = Path(config.output)
    state = _resumed_state(folder, config) if resume else None

    train_set, val_set = build_dataset(config, "train", augment=True), build_dataset(config, "val")
    check_classes("data.train", train_set.class_names, "data.val", val_set.class_names)
    distiller = build_distiller(config, train_set.class_names).to(device)
    if config.train.channels_last:
        distiller.to(memory_format=torch.channels_last)
    if distiller.teacher is not None:
        ready_teacher(config, distiller.teacher.to(device))
    optimizer = build_optimizer(config.optimizer, distiller)
    steps_per_epoch = len(build_batches(config, train_set, epoch=0))
    distiller.start(config.train.epochs, steps_per_epoch)
    progress = Progress()
    if state is None:
        _claim(folder, overwrite)
        (folder / "config.yaml").write_text(yaml.safe_dump(config.plain(), sort_keys=False), encoding="utf-8")
    else:
        progress = _restore(state, distiller, optimizer)

    def save(name: str) -> None:
        checkpoint.save(folder / name, {
            "model": distiller.student.state_dict(), "classes": train_set.class_names, "config": config.plain(),
            "task": distiller.task_state(), "optimizer": optimizer.state_dict(), **asdict(progress),
            "random": checkpoint.random_state(),
        })

    def end_if_asked() -> None:
        if termination.requested:
            raise Interrupted(f"ended by SIGTERM after step {progress.step}, which {folder / 'last.pt'} holds")

    def unless_asked(batches: Iterable) -> Iterator:
        for batch in batches:
            end_if_asked()
            yield batch

    with RunLog(folder, epochs=config.train.epochs, steps_per_epoch=steps_per_epoch, label=label, console=console,
                resume_step=None if state is None else progress.step, log_every=config.train.log_every) as log, \
            Termination() as termination:

        def save_now(step: int) -> bool:
            every = config.train.save_every
            return termination.requested or (every is not None and step % every == 0)

        while progress.epoch < config.train.epochs:
            batches = build_batches(config, train_set, epoch=progress.epoch, first_batch=progress.batch)
            for _ in train_steps(config, distiller, optimizer, batches, log, progress, steps_per_epoch, save_now):
                save("last.pt")
                end_if_asked()
            due = (progress.epoch + 1) % config.train.eval_every == 0 or progress.epoch + 1 == config.train.epochs
            if due:
                save("last.pt")  # an evaluation may take long, or fail
                metrics = evaluate(distiller.student, unless_asked(build_batches(config, val_set)), val_set)
            progress.epoch, progress.batch = progress.epoch + 1, 0
            best = False
            if due:
                if metrics["AP"] is None:
                    raise ConfigError("data.val holds no object, so nothing can be evaluated")
                best = metrics["AP"] > progress.best_ap
                progress.metrics, progress.best_ap = metrics, max(metrics["AP"], progress.best_ap)
                log.evaluation(progress.epoch, progress.step, metrics, best=best)
            if best:
                save("best.pt")
            save("last.pt")
            end_if_asked()
    return Result(progress.metrics, progress.best_ap, folder, time.perf_counter() - began)


def ready_teacher(config: Config, teacher: nn.Module) -> None:
    if config.train.channels_last:
        teacher.to(memory_format=torch.channels_last)
    if config.teacher.compile:
        teacher.backbone.compile(dynamic=True)


def train_steps(config: Config, distiller: Any, optimizer: torch.optim.Optimizer, batches: Iterable, log: RunLog,
                progress: Progress, steps_per_epoch: int, save_now: Callable[[int], bool]) -> Iterator[None]:
    """The steps over `batches`, what is left of an epoch. Moves `progress`; yields after a step where `save_now`."""
    device = next(distiller.parameters()).device
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    late = device.type in LATE_DEVICES
    waiting: Step | None = None
    distiller.train()
    tick = time.perf_counter()
    for images, targets in batches:
        images = [image.to(device, non_blocking=True) for image in images]
        targets = [{key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                    for key, value in target.items()} for target in targets]
        rate = learning_rate(config.optimizer, progress.step, steps_per_epoch, config.train.epochs)
        set_learning_rate(optimizer, rate)
        distiller.set_progress(progress.epoch, progress.batch)
        where = f"step {progress.step + 1}, images {', '.join(str(target['image_id']) for target in targets)}"
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=config.train.amp == "bf16"):
                losses = distiller(images, targets)
        except FloatingPointError as error:
            blamed = where if waiting is None else waiting.description  # what was not waited for is of the step before
            raise NonFiniteLoss(f"{error} at {blamed}") from None
        loss = sum(losses.values())
        current = Step({"loss": loss, **losses}, where)
        if not late:
            current.check()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm or math.inf)
        optimizer.step()

        progress.batch, progress.step = progress.batch + 1, progress.step + 1
        now = time.perf_counter()
        stats = {"grad_norm": norm, **distiller.stats}
        current.finish(progress.step, rate, stats, images=len(images), seconds=now - tick)
        tick = now
        if waiting is not None:
            waiting.write(log, progress.epoch)
        waiting = current
        if not late:
            waiting = waiting.write(log, progress.epoch)
        if save_now(progress.step):
            if waiting is not None:
                waiting = waiting.write_last(log, progress.epoch, distiller)
            yield
            tick = time.perf_counter()
    if waiting is not None:
        waiting.write_last(log, progress.epoch, distiller)


class Step:
    """The numbers of a step. A GPU is not waited for: they are looked at when the next step has been queued."""

    def __init__(self, losses: dict[str, Tensor], description: str) -> None:
        self.description = description
        self._losses = list(losses), HostCopy(torch.stack([value.detach().float() for value in losses.values()]))

    def check(self) -> dict[str, float]:
        """The losses as numbers; raises NonFiniteLoss naming those that are none."""
        names, numbers = self._losses
        values = dict(zip(names, numbers.tolist()))
        broken = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if broken:
            raise NonFiniteLoss(f"{'; '.join(broken)} at {self.description}; nothing of it is saved")
        return values

    def finish(self, step: int, rate: float, stats: dict[str, Tensor], *, images: int, seconds: float) -> None:
        self._stats = list(stats), HostCopy(torch.stack([value.detach().float() for value in stats.values()]))
        self._step, self._rate, self._images, self._seconds = step, rate, images, seconds

    def write(self, log: RunLog, epoch: int) -> None:
        losses = self.check()
        names, numbers = self._stats
        values = {"lr": self._rate, **losses, **dict(zip(names, numbers.tolist()))}
        log.step(epoch + 1, self._step, values, images=self._images, seconds=self._seconds)


    def write_last(self, log: RunLog, epoch: int, distiller: Any) -> None:
        """The same for a step that no other follows at once."""
        self.write(log, epoch)
        try:
            distiller.settle()
        except FloatingPointError as error:
            raise NonFiniteLoss(f"{error} at {self.description}; nothing of it is saved") from None


def build_batches(config: Config, dataset: Any, *, epoch: int | None = None, first_batch: int = 0) -> Any:
    """Training batches of `epoch` from `first_batch` on, or the whole data set in order."""
    return build_loader(dataset, batch_size=config.train.batch_size, shuffle=epoch is not None,
                        seed=config.train.seed, epoch=epoch or 0, workers=config.train.workers, first_batch=first_batch,
                        pin_memory=pick_device(config.train.device).type == "cuda")


def _claim(folder: Path, overwrite: bool) -> None:
    """Make the output folder, refusing one in use; `overwrite` removes an earlier run's files and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {folder} is a file, not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    used = [name for name in OUTPUTS if (folder / name).exists()]
    if used and not overwrite:
        raise ConfigError(f"output folder {folder} is in use (it holds {', '.join(used)}); "
                          "--resume continues that run, --overwrite starts again, or choose another output=")
    for name in used:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _resumed_state(folder: Path, config: Config) -> dict[str, Any]:
    """The checkpoint to go on from; one of a different run is refused, naming the keys that differ."""
    state = checkpoint.load(folder / "last.pt")
    before, now = _flat(state["config"]), _flat(config.plain())
    changed = [f"{key} ({before.get(key)!r} -> {now.get(key)!r})" for key in sorted(before.keys() | now.keys())
               if before.get(key) != now.get(key) and key not in FREE_ON_RESUME]
    if changed:
        raise ConfigError(f"{folder / 'last.pt'} belongs to a run with other settings: {', '.join(changed)}")
    return state


def _restore(state: dict[str, Any], distiller: Any, optimizer: torch.optim.Optimizer) -> Progress:
    distiller.student.load_state_dict(state["model"])
    distiller.load_task_state(state["task"])
    optimizer.load_state_dict(state["optimizer"])
    checkpoint.set_random_state(state["random"])
    return Progress(**{item.name: state[item.name] for item in fields(Progress)})


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def check_classes(left: str, left_names: list[str], right: str, right_names: list[str]) -> None:
    if left_names != right_names:
        raise ConfigError(f"{left} has the classes {left_names}, {right} has {right_names}")
