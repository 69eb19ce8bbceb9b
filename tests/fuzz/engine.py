"""Runs cases in a process of their own: one that crashes or hangs is a finding like any other, and not the end."""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

from .cases import Finding, Target, generator, slowness

PATIENCE = 120.0  # seconds for the imports of a new process

Table = dict[str, Counter[str]]  # by target: how many cases had which outcome


class Place(NamedTuple):
    """A case, and how long it may take."""

    target: str
    number: int
    hang: float  # seconds, on an idle machine


def all_targets() -> list[Target]:
    from . import commands, files, ops

    return [*ops.TARGETS, *files.TARGETS, *commands.TARGETS]


def fuzz(names: Sequence[str], seconds: float, seed: int) -> tuple[Table, list[str]]:
    """Random cases of the targets for a time; returns the counts and the findings in words."""
    table: Table = {name: Counter() for name in names}
    findings: list[str] = []
    end, turn = time.monotonic() + seconds, 0
    while (left := end - time.monotonic()) > 0:
        broken = _watch(names, seed, turn, left, table, findings)
        if broken is None:
            break
        turn = broken.number + 1
    return table, findings


def _watch(
    names: Sequence[str], seed: int, turn: int, seconds: float, table: Table, findings: list[str]
) -> Place | None:
    """Lets a process work from round ``turn`` on; returns the case that it crashed or hung in, if it did."""
    context = multiprocessing.get_context("spawn")
    connection, its_end = context.Pipe()
    process = context.Process(target=_work, args=(its_end, names, seed, turn, seconds), daemon=True)
    process.start()
    its_end.close()
    place, kind = None, ""
    while not kind:
        if not connection.poll((PATIENCE if place is None else place.hang) * slowness()):
            kind = "hang"
            break
        try:
            message = connection.recv()
        except EOFError:
            process.join()
            kind = "crash" if process.exitcode else "end"
            break
        if isinstance(message, Place):
            place = message
        elif isinstance(message, dict):
            for name, counts in message.items():
                table[name].update(counts)
        else:
            outcome, text = message
            table[place.target][outcome] += 1
            findings.append(_report(place, seed, outcome, text))
    exit_code = process.exitcode
    process.kill()
    process.join()
    if kind == "end":
        return None
    if place is None:
        raise RuntimeError(f"the fuzzing process could not begin (exit code {exit_code})")
    table[place.target][kind] += 1
    findings.append(_report(place, seed, kind, f"exit code {exit_code}"))
    return place


def _report(place: Place, seed: int, outcome: str, text: str) -> str:
    line = f"{outcome}: --only '{place.target}' --seed {seed} --case {place.number}: {text}"
    print(line, file=sys.stderr, flush=True)
    return line


def _work(parent: Connection, names: Sequence[str], seed: int, turn: int, seconds: float) -> None:
    """Rounds over the targets, from ``turn`` on."""
    import torch

    torch.set_num_threads(1)
    targets = [target for target in all_targets() if target.name in names]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        counts: Table = {}
        for target in targets:
            parent.send(Place(target.name, turn, target.hang))
            outcomes = counts.setdefault(target.name, Counter())
            try:
                outcomes.update(target.run(generator(seed, target.name, turn)))
            except Finding as finding:
                parent.send((finding.kind, str(finding)))
            except Exception:
                parent.send(("traceback", traceback.format_exc()[-600:]))
        parent.send(counts)
        turn += 1
