"""What a running training shows: one table, redrawn in a terminal; the same as a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import timedelta

import torch
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_GROUPS = ("loss", "distill", "gate")  # the groups that a line of text has room for
MEMORY = 0.95  # the weight of the steps before, against the last one, in the speed that is shown


def place(name: str) -> tuple[str, str]:
    """The group of a logged value and its name there: a row of the table, a tag ``group/name`` of TensorBoard's."""
    if name == "loss":
        return "loss", "total"
    for group in ("loss", "distill", "gate"):
        if name.startswith(f"{group}_"):
            return group, name.removeprefix(f"{group}_")
    return ("score" if name.endswith(("_score", "_iou")) else "train"), name


class Display:
    """A table that redraws itself in a terminal while this is used as a context manager.

    Elsewhere it is silent, and :meth:`line` gives the same as text.
    """

    def __init__(self, console: Console, *, label: str, epochs: int, total: int, step: int) -> None:
        self._label, self._epochs, self._total, self._epoch, self._step = label, epochs, total, 0, step
        self._values: dict[str, float] = {}
        self._steps = self._images = self._seconds = self._teachers = 0.0  # decaying sums over the last steps
        self._console = console
        self._live = Live(get_renderable=self.table, console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def update(
        self,
        epoch: int,
        step: int,
        values: Mapping[str, float],
        *,
        images: int,
        seconds: float,
        teachers_seconds: float = 0.0,
    ) -> None:
        self._epoch, self._step, self._values = epoch, step, dict(values)
        self._steps = MEMORY * self._steps + 1
        self._images = MEMORY * self._images + images
        self._seconds = MEMORY * self._seconds + seconds
        self._teachers = MEMORY * self._teachers + teachers_seconds

    def table(self) -> Table:
        """The first row says how far and how fast, each further one a group of values.

        What does not fit the terminal goes on in the next line, but no value is parted from its name.
        """
        label, groups = self._label or "training", self._groups()
        room = self._console.width - max(map(len, (label, *groups))) - 4
        bar = 20 if room >= 60 else 0
        head = Table.grid(padding=(0, 2))
        first, *further = _lines([self._position(), *self._speed()], room - (bar + 2 if bar else 0))
        head.add_row(*([ProgressBar(self._total, self._step, width=bar)] if bar else []), Text(first))
        for line in further:
            head.add_row(*([""] if bar else []), Text(line))
        table = Table.grid(padding=(0, 2))
        table.add_row(Text(label, style="bold"), head)
        for group, values in groups.items():
            table.add_row(Text(group, style="dim"), Text("\n".join(_lines(values, room))))
        return table

    def line(self) -> str:
        groups = [f"{group}: {' '.join(values)}" for group, values in self._groups().items() if group in LINE_GROUPS]
        return "  ".join([f"{self._label} {self._position()}".strip(), *self._speed(), *groups])

    def _position(self) -> str:
        return f"epoch {self._epoch}/{self._epochs} step {self._step}/{self._total}"

    def _speed(self) -> list[str]:
        """How fast, how much longer, and at what cost in memory."""
        facts = []
        if self._seconds:
            left = timedelta(seconds=round((self._total - self._step) * self._seconds / self._steps))
            facts = [_rate(self._steps, self._seconds, "step"), _rate(self._images, self._seconds, "image")]
            facts.append(f"{left} left")
            if self._teachers:
                facts.append(f"teacher {self._teachers / self._seconds:.0%} of the time")
        return [fact for fact in (*facts, memory_peak()) if fact]

    def _groups(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for key, value in self._values.items():
            group, name = place(key)
            groups.setdefault(group, []).append(f"{name} {value:.3g}")
        return groups


def _rate(count: float, seconds: float, what: str) -> str:
    """So many a second, or where that would be 0.0, how many seconds each takes."""
    return f"{count / seconds:.1f} {what}s/s" if count / seconds >= 0.05 else f"{seconds / count:.1f} s/{what}"


def _lines(words: list[str], width: int) -> list[str]:
    """The words in lines of at most that width, where they fit."""
    lines = words[:1]
    for word in words[1:]:
        if len(lines[-1]) + 2 + len(word) <= width:
            lines[-1] += f"  {word}"
        else:
            lines.append(word)
    return lines


def memory_peak() -> str:
    """The most that tensors took on the GPU; without one the process's resident set, where the system tells."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        used = torch.cuda.max_memory_allocated()
    else:
        try:
            import resource
        except ModuleNotFoundError:  # Windows
            return ""
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"peak {used / 2**30:.2f} GiB"
