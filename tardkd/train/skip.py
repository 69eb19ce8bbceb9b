"""What becomes of a step that is not finite: it ends the run, or is dropped where the recipe says so."""

from __future__ import annotations

import math

import torch

from tardkd.device import HostCopy
from tardkd.train.blame import NonFiniteLoss
from tardkd.train.logs import NoLog, RunLog
from tardkd.train.steps import Step
from tardkd.train.update import Update

MOST_SKIPS = 10  # in a row: a run whose weights have gone wrong would skip for ever


class Skipping:
    """Drops steps, as ``train.on_non_finite: skip`` wants it, but not too many in a row."""

    def __init__(self, update: Update, log: RunLog | NoLog, *, allowed: bool) -> None:
        self._update, self._log, self._allowed = update, log, allowed
        self._in_a_row = 0

    def skip(self, step: Step, error: NonFiniteLoss) -> None:
        """Go on as if the step had not been; raises `error` where that is not allowed."""
        self._in_a_row += 1
        if not self._allowed or self._in_a_row == MOST_SKIPS:
            raise error
        self._log.say(f"skipped: {error}")
        self._update.drop()
        step.norm = HostCopy(torch.tensor(math.nan))

    def go_on(self) -> None:
        """A step was finite."""
        self._in_a_row = 0
