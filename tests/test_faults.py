"""The table of faults names tests and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "tests/faults.md").read_text(encoding="utf-8")


def test_every_row_names_a_test_that_exists():
    rows = [line for line in TABLE.splitlines() if line.startswith("| ") and "---" not in line]
    rows = [row for row in rows if "| commit |" not in row]
    assert len(rows) > 40
    for row in rows:
        path, name = re.search(r"`(tests/[\w/]+\.py)::(test_\w+)`", row).groups()
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), row
        assert re.search(r"\| [0-9a-f]{7,} \|$", row), row


def test_every_file_that_is_named_exists():
    for path in re.findall(r"`((?:tardkd|csrc)/[\w/.]+)`", TABLE):
        assert (ROOT / path).is_file(), path
