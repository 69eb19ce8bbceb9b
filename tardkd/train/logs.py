"""What a run leaves behind and shows: CSV tables, TensorBoard scalars, and a table of progress or plain lines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from tardkd.files import UnwritableFileError
from tardkd.train.display import Display, place
from tardkd.train.evaluate import METRICS
from tardkd.train.tables import Table
from tardkd.train.terminal import patient_console

OnLog = Callable[[dict[str, Any]], None]  # what is given each step's and each evaluation's numbers by their names


class RunLog:
    """Everything that one run reports; use as a context manager.

    Steps and epochs are numbered from 1 as a reader counts them: step n is the n-th update.

    Args:
        on_log: is given what a row of train.csv or eval.csv holds, when it is written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        epochs: int,
        steps_per_epoch: int,
        resumed: tuple[int, int] | None,
        log_every: int,
        console: Console | None = None,
        label: str = "",
        on_log: OnLog | None = None,
    ) -> None:
        self.console = console or patient_console()
        self._on_log = on_log
        self._epochs, self._total, self._log_every, self._label = epochs, epochs * steps_per_epoch, log_every, label
        epoch, step = resumed or (None, None)  # the last ones that the checkpoint has
        self._steps = Table(folder / "train.csv", last=None if step is None else ("step", step))
        self._evaluations = Table(folder / "eval.csv", last=None if epoch is None else ("epoch", epoch))
        self._board_folder, self._purge_step = folder / "tensorboard", None if step is None else step + 1
        self._board: SummaryWriter | None = None  # made with its first value: each one leaves a file
        self._display = Display(self.console, label=label, epochs=epochs, total=self._total, step=step or 0)

    def __enter__(self) -> RunLog:
        self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.__exit__()
        self._steps.close()
        self._evaluations.close()
        if self._board is not None:
            with contextlib.suppress(OSError):  # what could not be written has been told
                self._board.close()

    def step(
        self,
        epoch: int,
        step: int,
        values: dict[str, float],
        *,
        images: int,
        seconds: float,
        teachers_seconds: float = 0.0,
    ) -> None:
        self._write(self._steps, {"epoch": epoch, "step": step, **values, "seconds": seconds})
        for name, value in values.items():
            self._scalar("/".join(place(name)), value, step)
        self._scalar("speed/images_per_second", images / max(seconds, 1e-9), step)
        self._display.update(epoch, step, values, images=images, seconds=seconds, teachers_seconds=teachers_seconds)
        if not self.console.is_terminal and (step % self._log_every == 0 or step == self._total):
            self.say(self._display.line())

    def evaluation(self, epoch: int, step: int, metrics: dict[str, Any], *, best: bool) -> None:
        """Log what `evaluate` returned: percent, None where there is no such object."""
        values = {name: value for name, value in metrics.items() if name != "per_class"}
        classes = metrics["per_class"]
        of_classes = {f"AP/{name}": value for name, value in classes.items()}
        self._write(self._evaluations, {"epoch": epoch, "step": step, **values, **of_classes})
        for group, scalars in (("AP", values), ("class_AP", classes)):
            for name, value in scalars.items():
                if value is not None:
                    self._scalar(f"{group}/{name}", value, step)
        self.say(f"{self._label} epoch {epoch}/{self._epochs} {describe(metrics)}{' (best)' if best else ''}".strip())

    def _scalar(self, tag: str, value: float, step: int) -> None:
        if self._board is None:
            if self._board_folder.exists() and not os.access(self._board_folder, os.W_OK | os.X_OK):
                # Its own thread would meet that, and say so by a traceback.
                raise UnwritableFileError(f"cannot write into {self._board_folder}: Permission denied")
            self._board = SummaryWriter(str(self._board_folder), purge_step=self._purge_step)
        try:
            self._board.add_scalar(tag, value, step)
        except OSError as error:  # of its own thread, and of some step before
            raise UnwritableFileError(f"cannot write into {self._board_folder}: {error.strerror}") from None

    def _write(self, table: Table, row: dict[str, Any]) -> None:
        table.write(row)
        if self._on_log is not None:
            self._on_log(dict(row))

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class NoLog:
    """A log that says nothing: of several processes only the first one reports."""

    def step(self, *args: Any, **kwargs: Any) -> None: ...

    def evaluation(self, *args: Any, **kwargs: Any) -> None: ...

    def say(self, text: str) -> None: ...


def describe(metrics: dict[str, Any]) -> str:
    names = [*METRICS, *(["VOC_AP50"] if "VOC_AP50" in metrics else [])]
    return " ".join(f"{name} {'-' if metrics[name] is None else format(metrics[name], '.1f')}" for name in names)
