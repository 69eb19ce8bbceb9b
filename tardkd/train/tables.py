"""The tables ``train.csv`` and ``eval.csv`` of a run: the way to write them, and the way to read them."""

from __future__ import annotations

import contextlib
import csv
import io
from pathlib import Path

from tardkd.files import UnwritableFileError, replacing

EPOCH, STEP = "epoch", "step"  # the first columns of every table


class TableError(ValueError):
    """A table that cannot be read; the message names the file and the line."""


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """The columns' names, and the rows, whose cells are numbers or empty; both are empty where the file is.

    A last line that is still being written, or that a crash has cut short, is left out.

    Raises:
        TableError: the file is damaged, or is no table of a run.
    """
    if not path.exists():
        return [], []
    try:
        text = path.read_bytes().decode("utf-8", errors="replace").replace("\0", "\N{REPLACEMENT CHARACTER}")
    except OSError as error:
        raise TableError(f"cannot read {path}: {error.strerror}") from None
    lines = iter(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    try:
        header = next(csv.reader(lines), [])  # which takes several lines where a class's name has
    except csv.Error as error:
        raise TableError(f"{path} is not a run's log: {error} in its first line") from None
    if not header:
        return [], []
    if not {EPOCH, STEP} <= set(header) or len(set(header)) < len(header) or "\N{REPLACEMENT CHARACTER}" in str(header):
        raise TableError(f"{path} is not a run's log: its first line does not name the columns epoch, step and others")
    keys = header.index(EPOCH), header.index(STEP)
    rows = []
    for number, line in enumerate(lines, start=1):
        cells = line.rstrip("\r\n").split(",")
        if (
            len(cells) != len(header)
            or not all(map(_is_number, cells))
            or not all(cells[key].isdecimal() for key in keys)
        ):
            raise TableError(
                f"{path} is not a run's log: row {number} is a row that does not fit its columns; mend it, or move "
                "the file away: it is a record alone, which no training depends on"
            )
        rows.append(cells)
    return header, rows


def _is_number(cell: str) -> bool:
    if not cell:
        return True
    try:
        float(cell)
    except ValueError:
        return False
    return cell.isascii() and "_" not in cell and len(cell) < 40


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
        """One more row.

        Raises:
            UnwritableFileError: it could not be written, as on a full disk.
        """
        if self._columns is None:
            self._columns = list(row)
            csv.writer(self._file).writerow(self._columns)
        unknown = sorted(row.keys() - set(self._columns))
        if unknown:
            raise ValueError(f"{self._path} has no column for {', '.join(unknown)}; it has {', '.join(self._columns)}")
        csv.writer(self._file).writerow([_cell(row.get(name)) for name in self._columns])
        try:
            self._file.flush()
        except OSError as error:
            raise UnwritableFileError(f"cannot write {self._path}: {error.strerror}") from None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been told
            self._file.close()

    def _truncate(self, column: str, last: int) -> None:
        header, rows = read_table(self._path)
        self._columns = header or None
        kept = [row for row in rows if int(row[header.index(column)]) <= last]
        with replacing(self._path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *kept] if header else [])


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"
