"""Which instructions of a disassembled function run more than once: those in loops, by its graph of jumps."""

from __future__ import annotations

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of SASS, such as ``@!P0 BRA 0x1f0``."""

    address: int
    guard: str  # "!P0"; "" where it runs in any case
    opcode: str  # "BRA"
    operands: str  # "0x1f0"


LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([\w.]+)\s*([^;]*?)\s*;")


def parse_instruction(line: str) -> Instruction | None:
    """None for a line that is no instruction."""
    found = LINE.match(line)
    return Instruction(int(found[1], 16), found[2] or "", found[3], found[4]) if found else None


def in_loops(code: list[Instruction]) -> list[Instruction]:
    """Those from which control can come back to them, and all of what is called from there."""
    following, called = edges(code)
    repeated = {node for component in components(following) for node in component}
    pending = [called[node] for node in repeated & called.keys()]
    while pending:
        new = reachable(pending.pop(), following) - repeated
        repeated |= new
        pending += [called[node] for node in new & called.keys()]
    return [code[node] for node in sorted(repeated)]


def jump_target(instruction: Instruction) -> int | None:
    found = re.search(r"(?<![\w\[])0x([0-9a-f]+)\s*$", instruction.operands)
    return int(found[1], 16) if found else None


def edges(code: list[Instruction]) -> tuple[list[set[int]], dict[int, int]]:
    """Where control can go to next from each instruction, and what the calls call, all by places in ``code``."""
    places = {instruction.address: place for place, instruction in enumerate(code)}
    following: list[set[int]] = [set() for _ in code]
    meeting: dict[str, int] = {}  # where the threads that part at a BSSY meet, by the register that they wait for
    tables = []  # jumps by a table, which the listing does not show
    called: dict[int, int] = {}
    for here, (_, guard, opcode, operands) in enumerate(code):
        kind = opcode.partition(".")[0]
        target = places.get(jump_target(code[here]), -1)
        if kind == "BRX":
            tables.append(here)
        elif kind == "BSYNC" and operands in meeting:
            following[here].add(meeting[operands])
        elif kind == "BSSY":
            meeting[operands.partition(",")[0]] = target
        elif kind == "CALL" and target >= 0:
            called[here] = target
        elif kind in ("BRA", "WARPSYNC") and target >= 0:
            following[here].add(target)
        goes_on = kind not in ("EXIT", "RET", "BRX", "BSYNC") and opcode != "BRA"
        if (goes_on or guard or (kind == "BRA" and "," in operands)) and here + 1 < len(code):
            following[here].add(here + 1)
    # A table leads on, to where nothing else leads.
    reached = {0, *called.values()}.union(*following)
    for table in tables:
        following[table] |= {place for place in range(table + 1, len(code)) if place not in reached}
    # What is called comes back, so that no kernel ends there: else the call is a jump.
    ends = {place for place, instruction in enumerate(code) if instruction.opcode == "EXIT"}
    while jumps := [here for here, target in called.items() if ends & reachable(target, following)]:
        for here in jumps:
            following[here].add(called.pop(here))
    return following, called


def reachable(start: int, following: list[set[int]]) -> set[int]:
    seen, pending = {start}, [start]
    while pending:
        new = following[pending.pop()] - seen
        seen |= new
        pending += new
    return seen


def components(following: list[set[int]]) -> list[list[int]]:
    """The sets of nodes that can all reach each other, by Tarjan; a node that cannot reach itself is in none."""
    order: dict[int, int] = {}
    lowest: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found = []
    for root in range(len(following)):
        if root in order:
            continue
        walk = [(root, iter(following[root]))]
        order[root] = lowest[root] = len(order)
        stack.append(root)
        on_stack.add(root)
        while walk:
            node, rest = walk[-1]
            for successor in rest:
                if successor not in order:
                    order[successor] = lowest[successor] = len(order)
                    stack.append(successor)
                    on_stack.add(successor)
                    walk.append((successor, iter(following[successor])))
                    break
                if successor in on_stack:
                    lowest[node] = min(lowest[node], order[successor])
            else:
                walk.pop()
                if walk:
                    lowest[walk[-1][0]] = min(lowest[walk[-1][0]], lowest[node])
                if lowest[node] == order[node]:
                    component = [stack.pop()]
                    while component[-1] != node:
                        component.append(stack.pop())
                    on_stack.difference_update(component)
                    if len(component) > 1 or node in following[node]:
                        found.append(component)
    return found
