"""What a step of each op should take on GPUs that are not there, from counts: benchmarks/results/predicted.

    python benchmarks/predict.py [--out FOLDER] [--tiny]
    python benchmarks/predict.py --measured benchmarks.json      # beside what pytest-benchmark measured on a GPU

A kernel takes as long as the busiest of: memory, for the bytes that a cache of the second level passes on
(csrc/ptx_on_cpu/cache.h); that cache, for the sectors asked for; the schedulers, one instruction of a warp a clock
each; shared memory, one wavefront a clock. To that come the start of the launch and, of a grid too small for the
device, the multiprocessors that stand idle. What torch launches beside the kernels is as fast as memory. A step takes
the device's time or the host's, whichever is longer.

What is wrong with that: the counts are of PTX, from which ptxas makes other instructions; no latency is modelled, so a
kernel with too few accesses under way is slower than it says; the clock is the highest there is. It is good for finding
what a kernel is bound by, and for comparing kernels.

One image of two and a quarter of channels and classes are run, and everything but launches and host time is multiplied
by eight: groups of channels are the same work on other addresses, and images follow each other. In the order of blocks
groups of channels come one after the other where regions are pooled, so that each has the whole cache; of pooled
tensors and of the Gaussian term they are side by side, so that a quarter has a quarter of it, with a quarter of the
blocks at a time.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import counts
import roofline
import torch
from devices import DEVICES, Device
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import Workload

from tardkd import ops
from tardkd.ops.cuda import CudaKernels
from tardkd.ops.registry import IMPLEMENTATIONS, run_kernels

RESULTS = Path(__file__).with_name("results")
LAUNCH_SECONDS = 3e-6  # from the end of one launch to the start of the next
SHARE = 4  # of channels and classes
SCALE = 2 * SHARE  # and of images
SIZES = dict(images=1, channels=64, classes=20)
SIZES_OF_ALL = "2 x 800 x 1344, 512 regions an image, 256 channels, 80 classes"
TINY = dict(**SIZES, height=160, width=224, regions=24)
CASES = (("float32", "NCHW"), ("float32", "channels_last"), ("bfloat16", "channels_last"))

FLOORS: dict[str, Callable[[Workload], roofline.Work]] = {
    "region, all open": lambda workload: roofline.region_distill(workload, gates(workload, "all")),
    "region": lambda workload: roofline.region_distill(workload, gates(workload, "either")),
    "pooled, all open": lambda workload: roofline.pooled_distill(workload, gates(workload, "all")),
    "pooled": lambda workload: roofline.pooled_distill(workload, gates(workload, "either")),
    "roi_align": roofline.roi_align,
    "gaussian": roofline.gaussian,
}


def gates(workload: Workload, gate: str) -> torch.Tensor:
    """(R, 3)."""
    return ops.pooled_distill_loss(*workload.pooled, workload.boxes, *workload.per_region, feature_gate=gate).gates


# --- what is counted -----------------------------------------------------------------------------------------------


class TorchTraffic(TorchDispatchMode):
    """Launches of torch's own ops and the bytes that they read and write; views and empty tensors are none."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "tardkd":
            with self:
                return run_kernels(func.name().split("::")[1].split(".")[0], "CPU", args)
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if not func.is_view and "empty" not in name and not (name == "aten::to" and result is args[0]):
            self.launches += 1
            tensors = [*_tensors(args), *_tensors([result])]
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


class Counts(NamedTuple):
    """Of a step, forward and backward; bytes and kernels of a share of the work."""

    kernels: list[counts.Kernel]
    memory: dict[str, int]  # bytes behind the caches of the devices
    torch_launches: int
    torch_bytes: int
    floor_bytes: int
    host_seconds: float


def cache_share(name: str) -> int:
    """Of the cache, and of the blocks at a time, that a share of the channels has: see above."""
    return 1 if name.startswith(("region", "roi_align")) else SHARE


def count(name: str, workload: Workload) -> Counts:
    step = counts.STEPS[name]
    floor = FLOORS[name](workload)
    beside = TorchTraffic()
    module = counts.ptx_on_cpu.load()
    for device in DEVICES.values():
        module.add_cache(device.cache // cache_share(name), 4 * device.multiprocessors // cache_share(name))
    kernels = counts.count(step, workload)
    memory = {key: sum(traffic) for key, traffic in zip(DEVICES, module.traffic(), strict=True)}
    with nothing_launched(), beside:
        step(workload)
    return Counts(kernels, memory, beside.launches, beside.bytes, floor.read + floor.written, host_seconds(step))


class nothing_launched:  # noqa: N801 - used like a function
    """The CUDA ops without their kernels: what is left is the host's work."""

    def __enter__(self) -> None:
        self._before = IMPLEMENTATIONS["CPU"]
        names = ("region_distill", "pooled_distill", "head_distill", "roi_align", "scale_gradients")
        names += ("roi_align_gather", "gaussian_feature_loss", "gaussian_feature_loss_backward")
        functions = {name: lambda *arguments: None for name in names}
        partials = {name: lambda *arguments: 64 for name in ("region_partials", "gaussian_partials", "gather_plan")}
        IMPLEMENTATIONS["CPU"] = CudaKernels(SimpleNamespace(**functions, **partials), lambda device: 0)

    def __exit__(self, *exception: object) -> None:
        IMPLEMENTATIONS["CPU"] = self._before


def host_seconds(step: counts.Step) -> float:
    """On this machine: Python and torch, on tensors so small that their contents take no time; the best of many."""
    workload = counts.inputs("float32", "NCHW", images=1, height=32, width=32, regions=4, channels=8, classes=4)
    _ = workload.pooled
    seconds = []
    with nothing_launched():
        for _ in range(200):
            start = time.perf_counter()
            step(workload)
            seconds.append(time.perf_counter() - start)
    return min(seconds)


# --- what follows --------------------------------------------------------------------------------------------------


def registers_of(table: str) -> dict[str, dict[str, int]]:
    """By kernel and compute capability, from results/ptxas.md."""
    [architectures] = re.findall(r"Architectures: (.*)\.", table)
    capabilities = [f"{name[3:-1]}.{name[-1]}" for name in architectures.split(", ")]
    found = {}
    for kernel, cell in re.findall(r"^\| `([^`]+)` \| ([\d /]+) \|", table, re.M):
        values = [int(value) for value in cell.split("/")]
        found[kernel] = dict(zip(capabilities, values * len(capabilities) if len(values) == 1 else values))
    return found


def blocks_at_once(kernel: counts.Kernel, device: Device, registers: int) -> int:
    """On one multiprocessor. Registers are given out by eight a thread; a block takes 1 KiB of shared memory more."""
    threads = -(-kernel.threads // kernel.blocks // 32) * 32
    by_registers = device.registers // (-(-registers // 8) * 8 * threads)
    by_shared = device.shared // (kernel.shared + 1024)
    return max(1, min(by_registers, by_shared, device.threads // threads))


class Prediction(NamedTuple):
    device_seconds: float
    bound_by: str  # the longest of the kernel that takes longest
    occupancy: str  # of that kernel: blocks a multiprocessor


def predict(counted: Counts, device: Device, key: str, registers: dict[str, dict[str, int]]) -> Prediction:
    """Of a step of the whole size."""
    clocks = device.multiprocessors * device.clock
    asked = [kernel.accesses() for kernel in counted.kernels]
    sectors = [sum(sums[1] for name, sums in one.items() if name.startswith("global")) for one in asked]
    longest = ("", 0.0, "")
    total = counted.torch_bytes * SCALE / device.bandwidth
    total += (len(counted.kernels) + counted.torch_launches) * LAUNCH_SECONDS
    for kernel, one, here in zip(counted.kernels, asked, sectors):
        wavefronts = sum(sums[1] for name, sums in one.items() if name.startswith("shared"))
        of_kernel = registers.get(kernel.name, {}).get(device.capability, 255)
        blocks = blocks_at_once(kernel, device, of_kernel)
        idle = max(1.0, device.multiprocessors * kernel.launches / (kernel.blocks * SCALE))
        seconds = {
            # The caches know no kernels: their bytes go to each by the sectors that it asks for.
            "memory": counted.memory[key] * (here / max(sum(sectors), 1)) * SCALE / device.bandwidth,
            "second level": here * 32 * SCALE / (device.l2_bytes * clocks),
            "instructions": kernel.warp_instructions * SCALE / (device.schedulers * clocks) * idle,
            "shared memory": wavefronts * SCALE / clocks * idle,
        }
        reason = max(seconds, key=seconds.get)
        total += seconds[reason]
        if seconds[reason] > longest[1]:
            longest = (f"{reason} of {kernel.name}", seconds[reason], f"{blocks}")
    return Prediction(total, longest[0], longest[2])


def last_change() -> str:
    """The commit that the kernels' sources are of."""
    command = ("git", "log", "-1", "--format=%h", "--", "csrc/cuda", "csrc/core")
    done = subprocess.run(command, cwd=RESULTS.parents[1], capture_output=True, text=True)
    return done.stdout.strip() or "an unknown commit"


# --- tables --------------------------------------------------------------------------------------------------------

HEADER = ("op", "case", "MB moved", "floor, MB", "M instructions of warps", "blocks a multiprocessor", "launches")
HEADER += ("host, ms", "device, ms", "share of the floor", "bound by")


def rows(all_counts: dict[str, Counts], device: Device, key: str, registers: dict) -> list[tuple[str, ...]]:
    found = []
    for name, counted in all_counts.items():
        op, case = name.split(" | ")
        one = predict(counted, device, key, registers)
        floor = counted.floor_bytes * SCALE
        moved = (counted.memory[key] + counted.torch_bytes) * SCALE
        instructions = sum(kernel.warp_instructions for kernel in counted.kernels) * SCALE
        launches = f"{sum(kernel.launches for kernel in counted.kernels)} + {counted.torch_launches}"
        share = floor / device.bandwidth / max(one.device_seconds, counted.host_seconds)
        numbers = (f"{moved / 1e6:.0f}", f"{floor / 1e6:.0f}", f"{instructions / 1e6:.0f}", one.occupancy, launches)
        times = (f"{counted.host_seconds * 1e3:.2f}", f"{one.device_seconds * 1e3:.3f}", f"{share:.0%}")
        found.append((op, case, *numbers, *times, one.bound_by))
    return found


def report(all_counts: dict[str, Counts], device: Device, key: str, registers: dict, sizes: str) -> str:
    about = (
        f"{device.multiprocessors} multiprocessors at {device.clock / 1e9} GHz, {device.bandwidth / 1e12:.3g} TB/s, "
        f"{device.cache >> 20} MiB of cache"
    )
    return (
        f"# {device.name}, predicted\n\nNothing here was measured but the host's time, on another machine; how it is "
        f"computed, and what that leaves out: `benchmarks/predict.py`. The kernels are those of {last_change()}. "
        f"{about}. Forward and backward; {sizes}; of the "
        f"launches the second number is torch's.\n\n{counts.table(HEADER, rows(all_counts, device, key, registers))}\n"
    )


# --- beside what was measured --------------------------------------------------------------------------------------

# Names of ops and gates in the benchmarks' records.
RECORDED = {
    ("region_distill_loss", "all"): "region, all open",
    ("region_distill_loss", "either"): "region",
    ("pooled_distill_loss", "all"): "pooled, all open",
    ("pooled_distill_loss", "either"): "pooled",
    ("multiscale_roi_align", ""): "roi_align",
    ("gaussian_feature_loss", ""): "gaussian",
}


def beside(measured: dict, predicted: dict[str, dict[str, float]]) -> str:
    """A table of the benchmarks that a prediction is there for, or why there is none."""
    header = ("op", "case", "predicted, ms", "measured, ms", "measured / predicted")
    found = []
    for benchmark in measured["benchmarks"]:
        info = benchmark["extra_info"]
        name = RECORDED.get((info.get("op"), info.get("gate")))
        if name is None or info["side"] != "tardkd" or info["sizes"] != SIZES_OF_ALL:
            continue
        device = next((key for key in predicted if key in info["device"]), None)
        case = info["case"].removeprefix("cuda ")
        expected = predicted.get(device, {}).get(f"{name} | {case}")
        if expected is None:
            continue
        seconds = info.get("device_seconds", benchmark["stats"]["median"])
        times = (f"{expected * 1e3:.3f}", f"{seconds * 1e3:.3f}", f"{seconds / expected:.2f}")
        found.append((name, case, *times))
    return counts.table(header, found) if found else "no prediction for this device and these sizes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "predicted")
    parser.add_argument("--tiny", action="store_true", help="few regions on small maps; the numbers mean nothing")
    parser.add_argument("--measured", type=Path, metavar="BENCHMARKS.json", help="print it beside what is in --out")
    options = parser.parse_args()
    if options.measured:
        predicted = json.loads((options.out / "seconds.json").read_text())
        print(beside(json.loads(options.measured.read_text()), predicted))
        return
    torch.set_num_threads(1)
    all_counts = {}
    for dtype, layout in CASES:
        workload = counts.inputs(dtype, layout, **(TINY if options.tiny else SIZES))
        for name in counts.STEPS:
            print(f"{name}, {dtype} {layout}", flush=True)
            all_counts[f"{name} | {dtype} {layout}"] = count(name, workload)
    registers = registers_of((RESULTS / "ptxas.md").read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = f"{SCALE} times the work of {workload.sizes}"
    for key, device in DEVICES.items():
        (options.out / f"{key}.md").write_text(report(all_counts, device, key, registers, sizes))
    seconds = {
        key: {name: predict(counted, device, key, registers).device_seconds for name, counted in all_counts.items()}
        for key, device in DEVICES.items()
    }
    (options.out / "seconds.json").write_text(json.dumps(seconds, indent=1) + "\n")


if __name__ == "__main__":
    main()
