"""``python -m tests.fuzz --seconds 60 --seed 0``: random inputs for a time, then a table of what they found.

A finding is printed with the words that repeat it: ``--only TARGET --seed SEED --case NUMBER``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .cases import FINDINGS, generator
from .engine import Table, all_targets, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other inputs")
    parser.add_argument("--only", help="the name of one target, or a part of it")
    parser.add_argument("--case", type=int, help="one case of one target, in this process")
    parser.add_argument("--record", type=Path, help="a JSON file to write the table to")
    arguments = parser.parse_args()
    if arguments.only:
        names = [target.name for target in all_targets() if arguments.only in target.name]
    else:
        names = [target.name for target in all_targets() if not target.is_slow]
    if arguments.case is not None:
        [target] = [target for target in all_targets() if target.name in names]
        print(*target.run(generator(arguments.seed, target.name, arguments.case)))
        return 0
    table, findings = fuzz(names, arguments.seconds, arguments.seed)
    print_table(table)
    if arguments.record:
        record = {"seconds": arguments.seconds, "seed": arguments.seed, "cases": table, "findings": findings}
        arguments.record.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 1 if findings else 0


def print_table(table: Table) -> None:
    outcomes = sorted({outcome for counts in table.values() for outcome in counts} - set(FINDINGS))
    columns = [*outcomes, *FINDINGS]
    width = max(map(len, table), default=0)
    print(" " * width, *(f"{column:>12}" for column in columns))
    for name, counts in table.items():
        print(f"{name:{width}}", *(f"{counts.get(column, 0):12}" for column in columns))


if __name__ == "__main__":
    sys.exit(main())
