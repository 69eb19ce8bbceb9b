"""What ptxas and the disassembly say of the CUDA kernels: registers, spills, the width of memory accesses.

    python tests/csrc/ptxas.py [--architectures 75 80 90] [--table benchmarks/results/ptxas.md]

Compiles every source of csrc/cuda with the flags of a release build, for each architecture and as PTX of the newest,
prints a Markdown table and fails if a hot kernel, or a function it calls, spills, lacks the wide accesses it is built
on, has an addition to memory that returns what was there, or in a loop an access to local memory or a generic one, of
which the hardware has to find out first what memory it goes to. Hot are all but those that accumulate in double, which
are for checks. Needs nvcc and c++filt; the disassembly is looked at where there is a cuobjdump: beside nvcc, on PATH,
or in the package of Triton. MAX_JOBS sources at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import loops

ROOT = Path(__file__).parents[2]
FLAGS = ("-Xptxas", "-v", "--cudart", "static", "-std=c++17", "-O3", "-DNDEBUG", "-lineinfo")


class Usage(NamedTuple):
    """What a kernel, or a function that is called and not inlined, takes on one architecture; memory in bytes."""

    kernel: str
    architecture: str
    registers: int | None  # None: of a function, whose registers count among those of the kernels
    shared: int  # declared in the kernel; what a launch asks for is not known here
    stack: int
    spill_stores: int
    spill_loads: int


# Kinds of instructions, by what the opcode looks like. LDG and STG go to global memory; LD and ST are generic. An
# addition to memory is a RED (REDG from sm_90 on), or an ATOMG, which also brings the old value back and takes longer.
KINDS = {
    "16-byte loads": r"LDG\.E\.(?:\w+\.)*128\b",
    "8-byte loads": r"LDG\.E\.(?:\w+\.)*64\b",
    "16-byte stores": r"STG\.E\.(?:\w+\.)*128\b",
    "generic 16-byte accesses": r"(?:LD|ST)\.E\.(?:\w+\.)*128\b",
    "generic accesses": r"(?:LD|ST)\.E\b",
    "vector adds": r"REDG?\.E\.ADD\.F32x4\b",
    "scalar adds": r"REDG?\.E\.ADD\.F(?:32|64)\.",
    "adds that return": r"ATOMG?\.E\.ADD\.F(?:32x4|32|64)\b",
    "local": r"(?:LDL|STL)\b",
}

# (kernel, oldest architecture, kind): the accesses that the kernel's speed rests on.
EXPECTED: tuple[tuple[str, int, str], ...] = (
    ("region_distill_kernel<float>", 75, "16-byte loads"),
    ("region_distill_kernel<float>", 75, "16-byte stores"),
    ("region_distill_norm_kernel<float>", 75, "16-byte loads"),
    ("region_distill_norm_kernel<float>", 75, "16-byte stores"),
    ("pooled_distill_kernel<float>", 75, "16-byte loads"),
    ("pooled_distill_kernel<float>", 75, "16-byte stores"),
    ("pooled_distill_norm_kernel<float>", 75, "16-byte loads"),
    ("pooled_distill_norm_kernel<float>", 75, "16-byte stores"),
    ("gaussian_loss_kernel<float>", 75, "16-byte loads"),
    ("gaussian_gradient_kernel<float>", 75, "16-byte loads"),
    ("gaussian_gradient_kernel<float>", 75, "16-byte stores"),
    ("roi_align_kernel<float>", 75, "16-byte loads"),
    ("roi_align_gather_kernel<float>", 75, "16-byte loads"),
    ("roi_align_gather_kernel<float>", 75, "16-byte stores"),
)

# Kinds that no hot kernel has: __threadfence() in the same kernel is enough for additions to return what was there, a
# structure passed by reference to a function that is not inlined for accesses to be generic or local.
FORBIDDEN = ("adds that return", "generic accesses in loops", "local in loops")


# --- names ---------------------------------------------------------------------------------------------------------


def demangle(symbols: list[str]) -> dict[str, str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        raise SystemExit("neither cu++filt nor c++filt was found: the names of the kernels cannot be read")
    names = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return dict(zip(symbols, names.splitlines()))


def short_name(name: str) -> str:
    """A demangled function without return type, namespaces and parameters, but with its template arguments."""
    name = name.replace("(anonymous namespace)::", "")
    depth = begin = 0
    for end, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == " " and depth == 0:
            begin = end + 1
        if character == "(" and depth == 0:
            name = name[begin:end]
            break
    return re.sub(r"\b(?:\w+::)+", "", name)


def is_hot(kernel: str) -> bool:
    return "double" not in kernel.partition("<")[2]


# --- ptxas ---------------------------------------------------------------------------------------------------------


def parse_usage(log: str) -> list[Usage]:
    """The kernels and functions, with mangled names, in the output of ``ptxas -v``; those of CUDA are left out."""
    lines = re.compile(
        r"Compiling entry function '(?P<entry>[^']+)' for '(?P<architecture>\w+)'"
        r"|Function properties for (?P<kernel>\S+)\n"
        r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
        r"(?:.*Used (?P<registers>\d+) registers(?P<rest>.*)\n)?"
    )
    usages: list[Usage] = []
    architecture, entries = "", []
    for found in lines.finditer(log):
        if found["entry"]:
            architecture = found["architecture"]
            entries.append((found["entry"], architecture))  # all of them ours
        elif "tardkd" in found["kernel"]:
            shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", found["rest"] or "")
            usages.append(
                Usage(
                    kernel=found["kernel"],
                    architecture=architecture,
                    registers=int(found["registers"]) if found["registers"] else None,
                    shared=int(shared[1]) if shared else 0,
                    stack=int(found["stack"]),
                    spill_stores=int(found["stores"]),
                    spill_loads=int(found["loads"]),
                )
            )
    if [usage[:2] for usage in usages if usage.registers is not None] != entries:
        raise ValueError("this ptxas writes its report in a form that is not understood:\n" + log)
    return usages


def merge(usages: list[Usage]) -> list[Usage]:
    """One of each name and architecture: a function that several sources compile counts as the worst of them."""
    worst: dict[tuple[str, str], Usage] = {}
    for usage in usages:
        key = usage[:2]
        numbers = (None if new is None else max(old, new) for old, new in zip(worst.get(key, usage)[2:], usage[2:]))
        worst[key] = Usage(*key, *numbers)
    return list(worst.values())


def spills(usages: list[Usage]) -> list[str]:
    """Complaints about hot kernels, by their short names."""
    return [
        f"{usage.kernel} on {usage.architecture}: {usage.spill_stores} and {usage.spill_loads} bytes spilled"
        for usage in usages
        if is_hot(usage.kernel) and (usage.spill_stores or usage.spill_loads)
    ]


# --- disassembly ---------------------------------------------------------------------------------------------------

Disassembly = dict[tuple[str, str], Counter]  # (kernel, architecture): how many instructions of each kind


def parse_disassembly(text: str) -> Disassembly:
    """The instructions of each kernel, with mangled names, in the output of ``cuobjdump --dump-sass``."""
    codes: dict[tuple[str, str], list[loops.Instruction]] = {}
    architecture, current = "", []
    for line in text.splitlines():
        if line.startswith("arch = "):
            architecture = line.removeprefix("arch = ")
        elif "Function : " in line:
            current = codes.setdefault((line.split("Function : ")[1].strip(), architecture), [])
        elif (instruction := loops.parse_instruction(line)) is not None:
            current.append(instruction)
    return {key: kinds(code) + kinds(loops.in_loops(code), " in loops") for key, code in codes.items()}


def kinds(code: list[loops.Instruction], where: str = "") -> Counter:
    return Counter(kind + where for i in code for kind, pattern in KINDS.items() if re.match(pattern, i.opcode))


def narrow_accesses(disassembly: Disassembly) -> list[str]:
    """Complaints about expected kinds of instructions that are not there."""
    complaints = []
    for prefix, oldest, kind in EXPECTED:
        kernels = {key: counts for key, counts in disassembly.items() if key[0].startswith(prefix)}
        if not kernels:
            complaints.append(f"{prefix}: there is no such kernel")
        complaints += [
            f"{kernel} on {architecture}: no {kind}"
            for (kernel, architecture), counts in kernels.items()
            if int(re.sub(r"\D", "", architecture)) >= oldest and not counts[kind]
        ]
    return complaints


def forbidden(disassembly: Disassembly) -> list[str]:
    """Complaints about kinds of instructions that hot kernels are not to have."""
    return [
        f"{kernel} on {architecture}: {counts[kind]} {kind}"
        for (kernel, architecture), counts in disassembly.items()
        for kind in FORBIDDEN
        if is_hot(kernel) and counts[kind]
    ]


# --- report --------------------------------------------------------------------------------------------------------


def table(usages: list[Usage], disassembly: Disassembly) -> str:
    """A row a kernel; where the architectures differ, their values one after the other."""
    architectures = list(dict.fromkeys(usage.architecture for usage in usages))
    columns = ["registers", "shared", "stack", "spill_stores", "spill_loads"]
    counted = list(KINDS) if disassembly else []
    header = ["kernel", *(column.replace("_", " ") for column in columns), *counted]
    lines = [f"Architectures: {', '.join(architectures)}.", "", row(header), row(["---"] * len(header))]
    for kernel in sorted({usage.kernel for usage in usages}):
        own = {usage.architecture: usage for usage in usages if usage.kernel == kernel}
        values = [[getattr(usage, column) for usage in own.values()] for column in columns]
        # The instructions of a function are counted with the kernels that call it.
        counts = [disassembly.get((kernel, name)) for name in own]
        values += [[None if count is None else count[kind] for count in counts] for kind in counted]
        lines.append(row([f"`{kernel}`", *map(cell, values)]))
    return "\n".join(lines) + "\n"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(values: list[int | None]) -> str:
    texts = ["" if value is None else str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


# --- running -------------------------------------------------------------------------------------------------------


def find_nvcc() -> str:
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("no nvcc was found: set CUDACXX to it, or put it on PATH")
    return nvcc


def find_cuobjdump(nvcc: str) -> str | None:
    folders = [str(Path(nvcc).resolve().parent), os.environ.get("PATH", "")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def compile_source(nvcc: str, source: Path, target: Path, architectures: list[str]) -> str:
    """Returns what ptxas says of it."""
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    newest = max(architectures, key=lambda name: int(re.sub(r"\D", "", name)))
    targets.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    command = [nvcc, *FLAGS, *targets, "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architectures", nargs="+", default=["75", "80", "90"], metavar="75")
    parser.add_argument("--table", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()

    nvcc = find_nvcc()
    cuobjdump = find_cuobjdump(nvcc)
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            logs = pool.map(lambda pair: compile_source(nvcc, *pair, arguments.architectures), zip(sources, objects))
            usages = [usage for log in logs for usage in parse_usage(log)]
        disassembly: Disassembly = {}
        for target in objects if cuobjdump else []:
            text = subprocess.run([cuobjdump, "--dump-sass", target], capture_output=True, text=True, check=True).stdout
            if "Fatbin ptx code" not in text:
                raise SystemExit(f"{target.name} holds no PTX")
            disassembly |= parse_disassembly(text)

    names = demangle(sorted({usage.kernel for usage in usages}))
    short = {symbol: short_name(name) for symbol, name in names.items()}
    usages = merge([usage._replace(kernel=short[usage.kernel]) for usage in usages])
    disassembly = {(short[symbol], name): counts for (symbol, name), counts in disassembly.items() if symbol in short}

    report = table(usages, disassembly)
    print(report)
    if arguments.table:
        release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        version = re.search(r"V[\d.]+", release)
        heading = f"# What ptxas says of the kernels\n\nnvcc {version[0] if version else '?'}, `{' '.join(FLAGS)}`."
        arguments.table.write_text(f"{heading} Bytes and counts of instructions.\n{report}")
    complaints = spills(usages)
    if cuobjdump:
        complaints += narrow_accesses(disassembly) + forbidden(disassembly)
    else:
        print("no cuobjdump was found: the disassembly was not looked at")
    if complaints:
        raise SystemExit("\n".join(complaints))
    print(f"{len(sources)} sources, {len(short)} kernels and functions: nothing to complain of")


if __name__ == "__main__":
    main()
