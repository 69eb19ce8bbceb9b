"""What a training prints, which goes on when nobody reads it any more."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO, cast

from rich.console import Console


def patient_console(*, quiet: bool = False) -> Console:
    """A console on the standard output whose failures end no training: what cannot be printed goes nowhere."""
    return Console(file=cast(TextIO, PatientStream()), quiet=quiet)


class PatientStream:
    """The standard output, wherever that is at the time; silent from the first failure on, such as a closed pipe."""

    def __init__(self) -> None:
        self._is_lost = False

    def write(self, text: str) -> int:
        self._try(lambda stream: _write(stream, text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def _try(self, work: Any) -> None:
        stream = _output()
        if self._is_lost or stream is None:  # None: the process was started without one
            return
        try:
            work(stream)
        except (OSError, ValueError):  # ValueError: it was closed in this process
            self._is_lost = True
            silence(stream)

    @property
    def rich_proxied_file(self) -> PatientStream:
        """What rich is to write into while it stands in for the standard output: not into that, but here."""
        return self

    def __getattr__(self, name: str) -> Any:
        """All else that a console asks of its file, such as whether it is a terminal."""
        return getattr(_output(), name)


def _output() -> Any:
    """The standard output itself, which rich replaces by something that prints on the console while a table is live."""
    return getattr(sys.stdout, "rich_proxied_file", sys.stdout)


def silence(stream: Any) -> None:
    """Let all that this process prints there go nowhere, what the stream still holds included."""
    try:
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):
        pass  # it is no file of the system's: then nothing is left to be flushed into it


def _write(stream: TextIO, text: str) -> None:
    """Write, with an escape for each character that the stream's encoding lacks."""
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, errors="backslashreplace").decode(encoding))
