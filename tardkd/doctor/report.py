"""What the checks found and what to do about it: on the terminal as they go, as data, and as an exit status."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tardkd.distill.findings import Finding, Level, problem

STYLES: dict[Level, str] = {"ok": "green", "skipped": "dim", "warning": "yellow", "problem": "bold red"}


class Report:
    """The findings of all checks in their order, each printed when it is made."""

    def __init__(self, console: Console) -> None:
        self.findings: list[tuple[str, Finding]] = []
        self._console = console

    def run(self, check: str, findings: Iterable[Finding]) -> None:
        """Take the findings of one check. An exception in it is one more problem, and ends that check alone."""
        with self._console.status(check):
            try:
                for finding in findings:
                    self._add(check, finding)
            except Exception as error:
                self._add(check, problem(describe_error(error)))

    @property
    def status(self) -> int:
        """The exit status of the command: 1 with a problem, else 0."""
        return int(bool(self.count("problem")))

    def count(self, level: Level) -> int:
        return sum(finding.level == level for _, finding in self.findings)

    def plain(self) -> dict[str, Any]:
        """The report as dicts, lists and plain values."""
        return {
            "problems": self.count("problem"),
            "warnings": self.count("warning"),
            "findings": [{"check": check, **asdict(finding)} for check, finding in self.findings],
        }

    def close(self) -> None:
        counts = [
            f"{number} {name}{'' if number == 1 else 's'}"
            for name in ("problem", "warning")
            if (number := self.count(name))
        ]
        end = "mend the problems before the run" if self.status else "the run can start"
        self._console.print(Text(f"{', '.join(counts) or 'nothing to mend'}; {end}", style="bold"))

    def _add(self, check: str, finding: Finding) -> None:
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(width=7)
        row.add_column(width=13)
        row.add_column(ratio=1, overflow="fold")
        again = bool(self.findings) and self.findings[-1][0] == check
        row.add_row(Text(finding.level, STYLES[finding.level]), "" if again else check, Text(finding.text))
        if finding.advice:
            row.add_row("", "", Text(f"-> {finding.advice}"))
        self.findings.append((check, finding))
        self._console.print(row)


def describe_error(error: Exception) -> str:
    """The message alone where it was written for the user, else with its kind."""
    message = str(error).strip()
    if isinstance(error, (ValueError, OSError)) or type(error).__module__.startswith("tardkd"):
        return message or type(error).__name__
    return f"{type(error).__name__}: {message.splitlines()[0]}" if message else type(error).__name__
