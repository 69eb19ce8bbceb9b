"""The numbers of steps on their way from the device to the log, read when that costs no waiting."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tardkd.device import HostCopy
from tardkd.train.blame import Blame
from tardkd.train.interrupt import Termination
from tardkd.train.logs import NoLog, RunLog
from tardkd.train.steps import Numbers, Step
from tardkd.train.update import Update

LATE_DEVICES = {"cuda"}  # these go on working when the host has queued a step


class Readings:
    """Reads each step's numbers, sees that they are finite, and logs them.

    Late: when the next step has been queued, so that the host never waits for a GPU; what is not finite is then known
    a step late. Otherwise at once, before the weights move.

    With the numbers travels whether a process has been told to end: all processes learn it in the same step.
    """

    def __init__(
        self, update: Update, blame: Blame, log: RunLog | NoLog, termination: Termination, *, late: bool
    ) -> None:
        self._update, self._processes = update, update.processes
        self._blame, self._log, self._termination, self._late = blame, log, termination, late
        self._waiting: Step | None = None  # the last step, where its numbers have not been read
        self._any_asked_to_end = False

    @property
    def asked_to_end(self) -> bool:
        """Whether the run is to end; with several processes, what all of them have learnt of any one."""
        return self._any_asked_to_end if self._processes.count > 1 else self._termination.requested

    @contextmanager
    def blaming(self, step: Step) -> Iterator[None]:
        """Turn what the distiller raises of tensors that are not finite into an error that names the step.

        Where the device is not waited for, the distiller's check is of the step before. Errors of other kinds get a
        note of the step and its images, which a traceback shows.
        """
        try:
            yield
        except FloatingPointError as error:
            raise self._blame.own(step if self._waiting is None else self._waiting, error) from None
        except Exception as error:
            if hasattr(error, "add_note"):  # as Python has it from 3.11 on
                error.add_note(f"at {step}")
            raise

    def take(self, step: Step, losses: dict[str, Tensor], stats: dict[str, Tensor]) -> None:
        """Send these scalars on their way.

        Raises:
            NonFiniteLoss: a loss is not finite, where it is read at once.
        """
        asked = torch.full_like(losses["loss"], self._termination.requested)
        step.losses = list(losses)
        step.numbers = Numbers({**losses, **stats, "asked_to_end": asked}, self._processes)
        if not self._late:
            self._read(step)

    def take_norm(self, step: Step, norm: Tensor) -> None:
        """The same with the norm () of the step's gradient."""
        step.norm = HostCopy(norm)
        if not self._late:
            self._read_norm(step)

    def write(self, step: Step) -> None:
        """Log what can be read without waiting: this step, or the one before.

        Raises:
            NonFiniteLoss: a number of the step before was not finite.
        """
        waiting, self._waiting = self._waiting, step
        if waiting is not None:
            self._write(waiting)
        if not self._late:
            self._write(step)
            self._waiting = None

    def settle(self) -> None:
        """Wait for the last step: after this all that is known has been checked and logged.

        Raises:
            NonFiniteLoss: something of the last step was not finite.
        """
        step, self._waiting = self._waiting, None
        if step is not None:
            self._write(step)
            with self.blaming(step):
                self._update.distiller.settle()

    def _read(self, step: Step) -> None:
        step.values = step.numbers.mean()
        self._any_asked_to_end = step.values.pop("asked_to_end") > 0
        if not all(math.isfinite(step.values[name]) for name in step.losses):
            own = step.numbers.own()
            raise self._blame.shared(
                step, [f"{name} is {own[name]}" for name in step.losses if not math.isfinite(own[name])]
            )

    def _read_norm(self, step: Step) -> None:
        """The gradient may be infinite where no loss is. It is shared, so that all processes see the same."""
        norm = step.norm.tolist()
        if not (math.isfinite(norm) or self._update.expects_overflow):
            raise self._blame.shared(step, [f"the gradient's norm is {norm}"])

    def _write(self, step: Step) -> None:
        if step.values is None:
            self._read(step)
            self._read_norm(step)
        losses = {name: step.values.pop(name) for name in step.losses}
        self._log.step(
            step.epoch,
            step.number,
            {"lr": step.rate, **losses, "grad_norm": step.norm.tolist(), **step.values},
            images=self._processes.count * sum(len(images) for images, _ in step.parts),
            seconds=step.seconds,
            teachers_seconds=step.teachers_seconds,
        )
