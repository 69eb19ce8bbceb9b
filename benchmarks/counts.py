"""What the hardware is asked for in a step of an op, kernel by kernel: counted by csrc/ptx_on_cpu, without a GPU.

    python benchmarks/counts.py [--ops region roi_align] [--dtypes float32] [--layouts channels_last] [--lines] [--tiny]

Of each kernel: blocks, instructions a thread by class, how many of a warp's lanes take part, sectors of global memory
asked for against the fewest that hold as many bytes, wavefronts of shared memory against those without conflicts of
banks, accesses to local memory. ``--lines``: of each line of the source that accesses memory. The regions are recorded
ones (``workloads.training``), on maps of the size that training has, with 64 channels unless ``--channels`` says
otherwise. Needs nvcc.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import ptx_on_cpu
import workloads
from ptx_on_cpu import Instruction
from workloads import SCALES, Workload

from tardkd import ops
from tardkd.ops.cuda import CudaKernels
from tardkd.ops.registry import IMPLEMENTATIONS

LAYOUTS = {"NCHW": False, "channels_last": True}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = dict(channels=64)
TINY = dict(images=1, height=160, width=224, regions=24, channels=64)

Step = Callable[[Workload], None]  # forward and backward


UPSTREAM = [torch.ones(())] * 3  # of the losses; made once, so that a step does not launch it


# --- steps ---------------------------------------------------------------------------------------------------------


def region(workload: Workload, gate: str) -> None:
    features = (workload.student_features, workload.teacher_features, workload.boxes)
    losses = ops.region_distill_loss(*features, *workload.per_region, student_scales=SCALES, feature_gate=gate)[:3]
    torch.autograd.grad(losses, workload.leaves, UPSTREAM)


def pooled(workload: Workload, gate: str) -> None:
    losses = ops.pooled_distill_loss(*workload.pooled, workload.boxes, *workload.per_region, feature_gate=gate)[:3]
    torch.autograd.grad(losses, workload.pooled_leaves, UPSTREAM)


def roi_align(workload: Workload) -> None:
    result = ops.multiscale_roi_align(workload.student_features, workload.boxes, scales=SCALES)
    torch.autograd.grad(result, workload.student_features, workload.pooled[1])


def gaussian(workload: Workload) -> None:
    loss = ops.gaussian_feature_loss(
        workload.student_features, workload.teacher_features, workload.gt_per_image, scales=SCALES
    )
    torch.autograd.grad(loss, workload.student_features, UPSTREAM[0])


STEPS: dict[str, Step] = {
    "region, all open": lambda workload: region(workload, "all"),
    "region": lambda workload: region(workload, "either"),
    "pooled, all open": lambda workload: pooled(workload, "all"),
    "pooled": lambda workload: pooled(workload, "either"),
    "roi_align": roi_align,
    "gaussian": gaussian,
}


# --- counting ------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    name: str
    launches: int
    blocks: int
    threads: int
    shared: int  # bytes a block
    code: list[Instruction]

    @property
    def instructions(self) -> int:
        """Of threads."""
        return sum(instruction.lanes for instruction in self.code)

    @property
    def warp_instructions(self) -> int:
        return sum(instruction.warps for instruction in self.code)

    def by_kind(self) -> Counter[str]:
        """Instructions of threads."""
        counts: Counter[str] = Counter()
        for instruction in self.code:
            counts[instruction.kind] += instruction.lanes
        return counts

    def accesses(self, by: Callable[[Instruction], str] = lambda i: i.access) -> dict[str, tuple[int, int, int]]:
        """Lanes, units and fewest units of the accesses to global, shared and local memory."""
        sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for i in self.code:
            if i.warps and i.access and "param" not in i.access:
                for k, value in enumerate((i.lanes, i.units, i.fewest)):
                    sums[by(i)][k] += value
        return {name: tuple(values) for name, values in sums.items()}


@contextmanager
def running(architecture: int) -> Iterator[ModuleType]:
    """The CUDA kernels' PTX takes the place of the CPU's kernels. Nothing is checked, so that it is faster."""
    module = ptx_on_cpu.load()
    module.reset()
    module.forbid_all()
    module.set_bounded(False)
    module.set_architecture(architecture)
    before = IMPLEMENTATIONS["CPU"]
    IMPLEMENTATIONS["CPU"] = CudaKernels(module, lambda device: 0)
    try:
        yield module
    finally:
        IMPLEMENTATIONS["CPU"] = before


def count(step: Step, workload: Workload, architecture: int = 90) -> list[Kernel]:
    _ = workload.pooled  # made before, by other kernels
    with running(architecture) as module:
        module.reset_counts()
        step(workload)
        return [
            Kernel(*(row[name] for name in Kernel._fields[:-1]), [Instruction(*entry) for entry in row["code"]])
            for row in module.kernels()
        ]


# --- report --------------------------------------------------------------------------------------------------------

HEADER = ("kernel", "blocks", "instructions a thread", "lanes", "of these", "accesses: units, times the fewest")


def row(kernel: Kernel) -> tuple[str, ...]:
    kinds = ", ".join(f"{kind} {n / kernel.threads:.0f}" for kind, n in kernel.by_kind().most_common())
    return (
        f"`{kernel.name}`",
        str(kernel.blocks),
        f"{kernel.instructions / kernel.threads:.0f}",
        f"{kernel.instructions / kernel.warp_instructions / 32:.0%}",
        kinds,
        ", ".join(f"{name} {describe(sums)}" for name, sums in sorted(kernel.accesses().items())),
    )


def describe(sums: tuple[int, int, int]) -> str:
    lanes, units, fewest = sums
    return f"{units} x{units / fewest:.2f}" if fewest else f"{lanes} lanes"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def inputs(dtype: str, layout: str, **sizes: int) -> Workload:
    return workloads.training(**sizes).to("cpu", DTYPES[dtype], LAYOUTS[layout])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ops", nargs="+", choices=STEPS, default=list(STEPS), metavar="OP")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="LAYOUT")
    parser.add_argument("--architecture", type=int, choices=(75, 90), default=90)
    parser.add_argument("--channels", type=int, default=SIZES["channels"])
    parser.add_argument("--lines", action="store_true", help="of each line of the source that accesses memory, too")
    parser.add_argument("--tiny", action="store_true", help="few regions on small maps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {**(TINY if options.tiny else SIZES), "channels": options.channels}
    for dtype in options.dtypes:
        for layout in options.layouts:
            workload = inputs(dtype, layout, **sizes)
            for name in options.ops:
                print(f"\n{name}, {dtype} {layout}, sm_{options.architecture}, {workload.sizes}\n")
                kernels = count(STEPS[name], workload, options.architecture)
                print(table(HEADER, [row(kernel) for kernel in kernels]), flush=True)
                for kernel in kernels if options.lines else ():
                    lines = kernel.accesses(lambda i: f"{i.access}, {i.source}")
                    print(f"\n`{kernel.name}`:\n")
                    for line, sums in sorted(lines.items(), key=lambda item: -item[1][1]):
                        print(f"- {line}: {describe(sums)}")


if __name__ == "__main__":
    main()
