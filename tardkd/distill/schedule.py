"""The weight lambda(t) of the distillation: full at first, fading as the two objectives conflict."""

from __future__ import annotations

import math
import warnings
from typing import Any

from .settings import ScheduleSettings


class Schedule:
    """lambda as a function of the position in the training.

    With t = 1 .. t_max the current epoch (``per="epoch"``) or iteration (``per="iteration"``) and x = (t - 1) / t_max
    the share of the training behind it, lambda is:

    - linear: 1 - x
    - cosine: (1 + cos(pi x)) / 2
    - step: gamma ** (number of milestones <= x)
    - constant: 1

    During the first ``warmup`` iterations this is multiplied by (iteration + 1) / warmup. From x >= ``stop`` on lambda
    is 0, where ``stop`` < 1. Before :meth:`start` the length of the training is unknown and lambda is 1.
    """

    def __init__(self, settings: ScheduleSettings) -> None:
        self.settings = settings
        self.total_epochs: int | None = None
        self.steps_per_epoch: int | None = None
        self.epoch = 0
        self.step = 0
        self._steps_untold = 0  # taken since start() while nobody called set_progress()
        self._is_told = False  # whether anybody did
        self._has_warned = False  # of a position beyond the end

    def start(self, total_epochs: int, steps_per_epoch: int) -> None:
        """Set the length of the training; the position stays."""
        if total_epochs < 1 or steps_per_epoch < 1:
            raise ValueError(
                f"a training has at least one epoch and one step, got total_epochs={total_epochs}, "
                f"steps_per_epoch={steps_per_epoch}"
            )
        self.total_epochs, self.steps_per_epoch = total_epochs, steps_per_epoch
        self._steps_untold, self._is_told, self._has_warned = 0, False, False

    def set_progress(self, epoch: int, step: int) -> None:
        """Move to ``step`` (0-based) of ``epoch`` (0-based); warns once where that is beyond what :meth:`start` said.

        Raises:
            RuntimeError: :meth:`start` was not called.
        """
        if self.total_epochs is None or self.steps_per_epoch is None:
            raise RuntimeError("call start(total_epochs, steps_per_epoch) before set_progress(epoch, step)")
        if epoch < 0 or step < 0:
            raise ValueError(f"epoch and step count from 0, got epoch={epoch}, step={step}")
        self.epoch, self.step, self._is_told = epoch, step, True
        if not self._has_warned and (epoch >= self.total_epochs or step >= self.steps_per_epoch):
            self._has_warned = True
            warnings.warn(
                f"set_progress({epoch}, {step}) is beyond the end: start() was told of {self.total_epochs} epochs of "
                f"{self.steps_per_epoch} steps, and both count from 0, the steps anew in every epoch; lambda is "
                f"{self.value:g}",
                stacklevel=2,
            )

    def count_step(self) -> None:
        """Note that a step is taken; warns once where lambda should have moved but nobody tells the position."""
        settings = self.settings
        is_constant = settings.kind == "constant" and not settings.warmup and settings.stop == 1
        if self.total_epochs in (None, 1) or self.steps_per_epoch is None or self._is_told or is_constant:
            return
        self._steps_untold += 1
        if self._steps_untold == 2 * self.steps_per_epoch + 1:
            warnings.warn(
                f"{self._steps_untold} steps, more than two epochs of the {self.steps_per_epoch} that start() was told "
                f"of, without a call of set_progress(epoch, step): lambda is still {self.value:g}, as at the beginning",
                stacklevel=2,
            )

    @property
    def value(self) -> float:
        """Lambda at the current position."""
        if self.total_epochs is None or self.steps_per_epoch is None:
            return 1.0
        settings = self.settings
        iteration = self.epoch * self.steps_per_epoch + self.step
        x = self.epoch / self.total_epochs
        if settings.per == "iteration":
            x = iteration / (self.total_epochs * self.steps_per_epoch)
        x = min(x, 1.0)
        if settings.stop < 1 and x >= settings.stop:
            return 0.0
        warm = min(1.0, (iteration + 1) / settings.warmup) if settings.warmup else 1.0
        if settings.kind == "linear":
            return warm * (1 - x)
        if settings.kind == "cosine":
            return warm * (1 + math.cos(math.pi * x)) / 2
        if settings.kind == "step":
            return warm * settings.gamma ** sum(milestone <= x for milestone in settings.milestones)
        return warm

    def state_dict(self) -> dict[str, Any]:
        """The length of the training and the position in it."""
        return {key: getattr(self, key) for key in ("total_epochs", "steps_per_epoch", "epoch", "step")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Move to what :meth:`state_dict` returned."""
        for key in self.state_dict():
            setattr(self, key, state[key])
