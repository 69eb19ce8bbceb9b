"""What a run leaves behind and shows: CSV tables, TensorBoard scalars, and a table of progress or plain lines."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from tardkd.train.display import Display, place
from tardkd.train.evaluate import METRICS


class Table:
    """A CSV file with the columns of its first row.

    Args:
        last: what to keep of an earlier run's rows, by the number in a column: ``("step", 7)`` drops those of later
            steps; None begins anew.
    """

    def __init__(self, path: Path, *, last: tuple[str, int] | None) -> None:
        self._path = path
        self._columns: list[str] | None = None
        if last is not None and path.exists():
            self._truncate(*last)
        self._file = open(path, "a" if last is not None else "w", newline="", encoding="utf-8")  # noqa: SIM115 (closed with the log)

    def write(self, row: dict[str, float | None]) -> None:
        if self._columns is None:
            self._columns = list(row)
            csv.writer(self._file).writerow(self._columns)
        unknown = sorted(row.keys() - set(self._columns))
        if unknown:
            raise ValueError(f"{self._path} has no column for {', '.join(unknown)}; it has {', '.join(self._columns)}")
        csv.writer(self._file).writerow([_cell(row.get(name)) for name in self._columns])
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _truncate(self, column: str, last: int) -> None:
        with open(self._path, newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        self._columns = header or None
        # A row that a crash cut short is one after the checkpoint, too.
        kept = [row for row in rows if len(row) == len(header) and int(row[header.index(column)]) <= last]
        temporary = self._path.with_suffix(".tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *kept] if header else [])
        os.replace(temporary, self._path)


class RunLog:
    """Everything that one run reports; use as a context manager.

    Steps and epochs are numbered from 1 as a reader counts them: step n is the n-th update.
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
    ) -> None:
        self.console = console or Console()
        self._epochs, self._total, self._log_every, self._label = epochs, epochs * steps_per_epoch, log_every, label
        epoch, step = resumed or (None, None)  # the last ones that the checkpoint has
        self._steps = Table(folder / "train.csv", last=None if step is None else ("step", step))
        self._evaluations = Table(folder / "eval.csv", last=None if epoch is None else ("epoch", epoch))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=None if step is None else step + 1)
        self._display = Display(self.console, label=label, epochs=epochs, total=self._total, step=step or 0)

    def __enter__(self) -> RunLog:
        self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.__exit__()
        self._board.close()
        self._steps.close()
        self._evaluations.close()

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
        self._steps.write({"epoch": epoch, "step": step, **values, "seconds": seconds})
        for name, value in values.items():
            self._board.add_scalar("/".join(place(name)), value, step)
        self._board.add_scalar("speed/images_per_second", images / max(seconds, 1e-9), step)
        self._display.update(epoch, step, values, images=images, seconds=seconds, teachers_seconds=teachers_seconds)
        if not self.console.is_terminal and (step % self._log_every == 0 or step == self._total):
            self.say(self._display.line())

    def evaluation(self, epoch: int, step: int, metrics: dict[str, Any], *, best: bool) -> None:
        """Log what `evaluate` returned: percent, None where there is no such object."""
        values = {name: value for name, value in metrics.items() if name != "per_class"}
        classes = metrics["per_class"]
        self._evaluations.write(
            {"epoch": epoch, "step": step, **values, **{f"AP/{name}": value for name, value in classes.items()}}
        )
        for group, scalars in (("AP", values), ("class_AP", classes)):
            for name, value in scalars.items():
                if value is not None:
                    self._board.add_scalar(f"{group}/{name}", value, step)
        self.say(f"{self._label} epoch {epoch}/{self._epochs} {describe(metrics)}{' (best)' if best else ''}".strip())

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


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"
