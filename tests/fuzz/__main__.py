"""``python -m tests.fuzz --seconds 60 --seed 0``: random inputs for a time, then a table of what they found.

A finding is printed with the words that repeat it: ``--only TARGET --seed SEED --case NUMBER``. A record adds up what
several runs tried, each with a seed of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import FINDINGS, generator
from .engine import Table, all_targets, fuzz

Record = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other inputs")
    parser.add_argument("--only", help="the name of one target, or a part of it")
    parser.add_argument("--case", type=int, help="one case of one target, in this process")
    parser.add_argument("--record", type=Path, help="a JSON file to add the table to")
    arguments = parser.parse_args()
    if arguments.only:
        names = [target.name for target in all_targets() if arguments.only in target.name]
    else:
        names = [target.name for target in all_targets() if not target.is_slow]
    if arguments.case is not None:
        [target] = [target for target in all_targets() if target.name in names]
        print(*target.run(generator(arguments.seed, target.name, arguments.case)))
        return 0
    record = read_record(arguments.record, arguments.seed, names)
    table, findings = fuzz(names, arguments.seconds, arguments.seed)
    print_table(table)
    if arguments.record:
        run = {"seconds": arguments.seconds, "seed": arguments.seed, "targets": names}
        record = added(record, run, table, findings)
        arguments.record.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 1 if findings else 0


def read_record(path: Path | None, seed: int, names: Sequence[str]) -> Record:
    """What earlier runs tried; refused where one of them had the same cases, which would count twice."""
    if path is None or not path.exists():
        return {"runs": [], "cases": {}, "findings": []}
    record = json.loads(path.read_text(encoding="utf-8"))
    for run in record["runs"]:
        again = sorted({*run["targets"]} & {*names})
        if run["seed"] == seed and again:
            sys.exit(f"{path} holds {', '.join(again)} with the seed {seed} already: choose another --seed")
    return record


def added(record: Record, run: Record, table: Table, findings: list[str]) -> Record:
    """The record with one more run in it."""
    cases = {name: Counter(counts) for name, counts in record["cases"].items()}
    for name, counts in table.items():
        cases.setdefault(name, Counter()).update(counts)
    return {"runs": [*record["runs"], run], "cases": cases, "findings": [*record["findings"], *findings]}


def print_table(table: Table) -> None:
    outcomes = sorted({outcome for counts in table.values() for outcome in counts} - set(FINDINGS))
    columns = [*outcomes, *FINDINGS]
    width = max(map(len, table), default=0)
    print(" " * width, *(f"{column:>12}" for column in columns))
    for name, counts in table.items():
        print(f"{name:{width}}", *(f"{counts.get(column, 0):12}" for column in columns))


if __name__ == "__main__":
    sys.exit(main())
