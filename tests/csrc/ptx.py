"""What the tests of the kernels' PTX see of it, and whether they see faults put into it.

    python tests/csrc/ptx.py coverage [PYTEST ARGUMENTS]   # such as -k "ptx-90 and gaussian"; default: all of ptx-90
    python tests/csrc/ptx.py mutants [KERNEL ...] [--table benchmarks/results/mutants.md]

``coverage`` runs tests of the ops and prints which share of each kernel's instructions ran, and of which lines of the
source some never did. ``mutants`` takes one barrier, fence or ordered access out of a kernel at a time and runs steps
that come by it: a mutant is caught if a rule is broken or the numbers differ. It fails if one is not. Kernels that
accumulate in double are the same code, and are left out. Needs nvcc.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import ptx_on_cpu
import pytest
import torch
from ops.scenes import make_scene
from ops.test_launches import STEPS, align, gaussian, pooled, region
from ptx_on_cpu import Instruction
from torch import Tensor

from tardkd.ops.cuda import CudaKernels
from tardkd.ops.registry import IMPLEMENTATIONS

# --- coverage ------------------------------------------------------------------------------------------------------


def coverage(arguments: list[str]) -> None:
    tests = str(Path(__file__).parents[1] / "ops")
    status = pytest.main([tests, "-q", "-p", "no:cacheprovider", "-m", "ptx", *(arguments or ["-k", "ptx-90"])])
    for line in covered(ptx_on_cpu.load().kernels()):
        print(line)
    raise SystemExit(status)


def covered(kernels: list[dict]) -> Iterator[str]:
    for kernel in sorted(kernels, key=lambda kernel: kernel["name"]):
        code = [Instruction(*row) for row in kernel["code"]]
        never = [instruction for instruction in code if instruction.line and not instruction.warps]
        yield f"{kernel['name']}: {len(code) - len(never)} of {len(code)} instructions ran"
        for source, count in sorted(Counter(instruction.source for instruction in never).items()):
            yield f"    {count:4} of {source} never did, such as {next(i.text for i in never if i.source == source)}"


# --- mutants -------------------------------------------------------------------------------------------------------

Results = list[Tensor]
WRONG = "the numbers differ"

# What orders accesses, and what is left of it.
MUTATIONS = (
    (re.compile(r"\bbar\.sync\s+0"), ""),
    (re.compile(r"\bbar\.warp\.sync\s+[^;]+"), ""),
    (re.compile(r"\bmembar\.gl\b"), ""),
    (re.compile(r"\batom\.acq_rel\.gpu\."), "atom."),
    (re.compile(r"\bld\.global\.cg\."), "ld.global."),
)


class Mutant(NamedTuple):
    kernel: str
    instruction: Instruction
    ptx: str


# What is ordered: accesses to what other threads write. Atomics order, too; a call may do anything.
ORDERED = re.compile(r"\b((ld|st)\.shared|ld\.global\.(?!nc)|ld\.f|ld\.u|atom|call)")


def orders_nothing(lines: list[str], barrier: int) -> bool:
    """Whether no thread comes from there to an access to what other threads write."""
    labels = {line.strip()[:-1]: n for n, line in enumerate(lines) if line.strip().endswith(":")}
    seen, pending = set(), [barrier + 1]
    while pending:
        n = pending.pop()
        if n in seen or lines[n].startswith("}"):
            continue
        seen.add(n)
        words = lines[n].split()
        if ORDERED.search(lines[n]):
            return False
        jump = next((labels[word.rstrip(";")] for word in words if word.rstrip(";") in labels), None)
        if jump is not None and not lines[n].strip().endswith(":"):
            pending.append(jump)
            if words[0] == "bra.uni" or words[0] == "bra":
                continue
        if words[:1] != ["ret;"]:
            pending.append(n + 1)
    return True


def mutants_of(kernel: dict, texts: list[str]) -> Iterator[Mutant]:
    """One for each ordering instruction of the kernel that has run, and that has something to order."""
    [text] = [text for text in texts if f".entry {kernel['entry']}(" in text]
    lines = text.split("\n")
    for instruction in (Instruction(*row) for row in kernel["code"]):
        for pattern, replacement in MUTATIONS:
            if instruction.warps and pattern.search(instruction.text):
                if orders_nothing(lines, instruction.line - 1):
                    continue
                line = lines[instruction.line - 1]
                changed = pattern.sub(replacement, line)
                assert changed != line, (instruction, line)
                others = [*lines[: instruction.line - 1], changed, *lines[instruction.line :]]
                yield Mutant(kernel["name"], instruction, "\n".join(others))


LARGE = dict(output_size=(9, 10), sampling_ratio=9)  # more bins and samples than a block takes at once
FINE = dict(canonical_scale=2000)  # all regions on the finest level: more pixels than a block stages at once


def steps() -> dict[str, Callable[[], Results]]:
    """Forward and backward passes that take a block through every loop more than once."""
    norms = partial(region, feature_norm="channel")
    found = {name: step_of(make) for name, make in STEPS.items()}
    for name in ("pooled", "align", "gaussian", "region"):
        found[f"{name} channels_last"] = step_of(STEPS[name], "channels_last")
    for layout in ("nchw", "channels_last"):
        found[f"region of unlike sides {layout}"] = step_of(STEPS["region"], layout, geometry="resolution")
        found[f"region with norms {layout}"] = step_of(norms, layout)
        found[f"region of many pixels {layout}"] = step_of(partial(region, **FINE), layout)
        found[f"align of many pixels {layout}"] = step_of(partial(align, **FINE), layout)
    found["pooled with norms"] = step_of(partial(pooled, feature_norm="channel"))
    found["region of many bins"] = step_of(partial(region, **LARGE))
    found["region of many bins with norms"] = step_of(partial(norms, **LARGE))
    found["region with norms of many pixels"] = step_of(partial(norms, **FINE))
    found["region with norms of unlike sides"] = step_of(norms, geometry="resolution")
    found["gaussian of many boxes"] = step_of(partial(gaussian, boxes=300))
    found["align of many regions"] = step_of(align, regions=1100, channels=4)
    return found


def step_of(
    make: Callable,
    layout: str = "nchw",
    geometry: str = "equal",
    regions: int = 14,
    channels: int = 72,
) -> Callable[[], Results]:
    def run() -> Results:
        scene = make_scene(3, regions=regions, channels=channels, geometry=geometry).to(
            torch.float32, None, layout, layout
        )
        forward, leaves = make(scene)
        outputs = forward()
        return [*outputs, *torch.autograd.grad(outputs, leaves, list(map(torch.ones_like, outputs)))]

    return run


def verdict(run: Callable[[], Results], expected: Results) -> str:
    """How the step shows that something is wrong; "" if it does not."""
    try:
        found = run()
    except RuntimeError as error:
        rules = re.findall(r"times ([^|]+?) \|", str(error))
        return ", ".join(sorted(set(rules))) or str(error).partition("\n")[0]
    same = all(torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True) for a, b in zip(found, expected))
    return "" if same else WRONG


class Outcome(NamedTuple):
    mutant: Mutant
    how: str  # it was caught; "" if it was not
    run: str  # that caught it

    def __str__(self) -> str:
        kernel, instruction, _ = self.mutant
        place = f"{kernel}: {instruction.source}, line {instruction.line}: {instruction.text}"
        return f"{place}: {self.how} ({self.run})" if self.how else f"{place}: NOT CAUGHT"


def mutants(wanted: list[str], module: ptx_on_cpu.Bounded, runs: dict[str, Callable[[], Results]]) -> list[Outcome]:
    """What became of every mutant in the ``runs``; prints it."""
    expected, reached = {}, {}
    kernels: dict[str, dict] = {}
    for name, run in runs.items():
        module.reset_counts()
        expected[name] = run()
        for kernel in module.kernels():
            ran = {row[2] for row in kernel["code"] if row[3]}
            reached.setdefault(kernel["entry"], {})[name] = ran
            known = kernels.setdefault(kernel["entry"], kernel)
            known["code"] = [max(rows, key=lambda row: row[3]) for rows in zip(known["code"], kernel["code"])]
    outcomes, texts = [], module.texts()
    for entry, kernel in kernels.items():
        if "double" in kernel["name"] or (wanted and not any(name in kernel["name"] for name in wanted)):
            continue
        for mutant in mutants_of(kernel, texts):
            module.replace(mutant.ptx)
            names = [name for name, ran in reached[entry].items() if mutant.instruction.line in ran]
            verdicts = ((verdict(runs[name], expected[name]), name) for name in names)
            outcomes.append(Outcome(mutant, *next((found for found in verdicts if found[0]), ("", ""))))
            module.restore()
            print(outcomes[-1], flush=True)
    return outcomes


HEADING = """# Kernels without one of their barriers

PTX for compute capability 9.0, run by csrc/ptx_on_cpu: a mutant lacks one barrier, fence or ordered access. Of what is
not caught, by its line in the source, another barrier does the same."""


def table(outcomes: list[Outcome]) -> Iterator[str]:
    """A row a kernel: how many mutants there are, how many were caught by what, and the others."""
    yield "| kernel | mutants | a race or another rule | wrong numbers | not caught |"
    yield "| --- | --- | --- | --- | --- |"
    for kernel in dict.fromkeys(outcome.mutant.kernel for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.mutant.kernel == kernel]
        numbers = sum(outcome.how == WRONG for outcome in own)
        others = Counter(outcome.mutant.instruction.source for outcome in own if not outcome.how)
        places = ", ".join(sorted(others))
        by_rule = len(own) - numbers - others.total()
        yield f"| `{kernel}` | {len(own)} | {by_rule} | {numbers} | {others.total()}{places and ': ' + places} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=["coverage", "mutants"])
    parser.add_argument("--table", type=Path, help="also write the table of the mutants to this file")
    options, rest = parser.parse_known_args()
    if options.command == "coverage":
        coverage(rest)
    torch.set_num_threads(1)
    module = ptx_on_cpu.start(90)
    IMPLEMENTATIONS["CPU"] = CudaKernels(module, lambda device: 0)
    outcomes = mutants(rest, module, steps())
    text = "\n".join(table(outcomes))
    print(text)
    if options.table:
        options.table.write_text(f"{HEADING}\n\n{text}\n")
    if not all(outcome.how for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
