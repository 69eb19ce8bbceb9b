"""What a check found, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["ok", "skipped", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level  # ok: nothing to mend; warning: know this first; problem: do not train like this; skipped: not seen
    text: str  # what was found
    advice: str = ""  # what to do
    numbers: dict[str, Any] = field(default_factory=dict)  # those behind the text, plain values

    def __str__(self) -> str:
        return f"{self.level:8} {self.text}" + (f"\n{'':8} -> {self.advice}" if self.advice else "")


class Findings(list[Finding]):
    """Findings in the order of the checks; as text, a line of each and its advice."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    @property
    def problems(self) -> list[Finding]:
        """Those that are to be mended before a training."""
        return [finding for finding in self if finding.level == "problem"]


def ok(text: str, advice: str = "", **numbers: Any) -> Finding:
    return Finding("ok", text, advice, numbers)


def skipped(text: str) -> Finding:
    return Finding("skipped", text)


def warning(text: str, advice: str, **numbers: Any) -> Finding:
    return Finding("warning", text, advice, numbers)


def problem(text: str, advice: str = "", **numbers: Any) -> Finding:
    return Finding("problem", text, advice, numbers)


def first(names: Iterable[Any], shown: int = 5) -> str:
    """The first of many names and how many more there are, for a line of text."""
    names = [str(name) for name in names]
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
