"""A run that is asked to end, by Ctrl-C or as schedulers do with SIGTERM, saves what it has first."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class Interrupted(RuntimeError):
    """The run ended because it was told to; the message names the checkpoint it can go on from.

    Args:
        number: the signal that told it.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.number = number


class Termination:
    """Notes SIGTERM and Ctrl-C instead of dying of them, while used as a context manager in the main thread.

    A second Ctrl-C ends the process at once, but not one of several: torchrun repeats the first to all of them.
    """

    def __init__(self, *, is_alone: bool = True) -> None:
        self.number: int | None = None  # the signal that was noted
        self._is_alone = is_alone
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the run is to end."""
        return self.number is not None

    @property
    def name(self) -> str:
        """What told the run to end; of several processes another one may have been told."""
        return NAMES[signal.SIGTERM if self.number is None else signal.Signals(self.number)]

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in NAMES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._is_alone:
            if self.number == signal.SIGINT:
                raise KeyboardInterrupt
            with contextlib.suppress(OSError):  # by the descriptor: the stream may be in use at this moment
                os.write(2, b"saving, then the run ends; Ctrl-C again ends it at once\n")
        self.number = self.number or number
