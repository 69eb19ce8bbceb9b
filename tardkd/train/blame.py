"""A step whose loss or gradient is not finite: what is said of it, and what is kept of it to be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tardkd.train import checkpoint
from tardkd.train.distributed import Processes
from tardkd.train.steps import Step


class NonFiniteLoss(RuntimeError):
    """A loss term or the gradient became infinite or NaN; the message names it, the step and the images."""


class Blame:
    """Names the steps that failed, and keeps their images in ``failed.pt``.

    Args:
        late: a step is known to have failed only after the weights have moved on, so that they are not kept with it.
    """

    def __init__(self, folder: Path, student: nn.Module, processes: Processes, *, late: bool) -> None:
        self._folder, self._student, self._processes, self._late = folder, student, processes, late

    def own(self, step: Step, what: object) -> NonFiniteLoss:
        """The error of a step that failed in this process."""
        return NonFiniteLoss(f"{what} at {step}; {self._keep(step)}")

    def shared(self, step: Step, broken: list[str]) -> NonFiniteLoss:
        """The error of a step that all processes know to have failed; `broken` is what did so in this one, if any."""
        described = f"{'; '.join(broken)} at {step}; {self._keep(step)}" if broken else None
        return NonFiniteLoss("; ".join(filter(None, self._processes.gather(described))))

    def _keep(self, step: Step) -> str:
        """Save the images of the step, and say where."""
        path = self._folder / ("failed.pt" if self._processes.is_first else f"failed-{self._processes.rank}.pt")
        state: dict[str, Any] = {
            "step": step.number,
            "epoch": step.epoch,
            "parts": [list(part) for part in step.parts],
        }
        if not self._late:
            state["model"] = self._student.state_dict()
        checkpoint.save(path, state)
        return f"{path} holds these images; nothing else of that step is saved"
