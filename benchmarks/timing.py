"""How a step is timed, and what else is measured of it.

pytest-benchmark's own statistics are wall time, until the device has finished. On a CUDA device ``extra_info`` gets too

- ``device_seconds``: between events; the work is queued behind a plug, so that the device need not wait for the host;
- ``host_seconds``: until the call returns;
- ``launches`` (kernels, fills and copies) and ``synchronisations``;

and everywhere ``peak_extra_bytes``, as far as it can be had.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from steps import Step
from torch.autograd import DeviceType
from workloads import Workload

from tardkd import ops

SECONDS = 2  # a step is timed for about so long, in 3 to 50 rounds
PLUG_CYCLES = 20_000_000  # some 10 ms: longer than the host needs to queue a step


def copies_needed(device: str, input_bytes: int) -> int:
    """How many inputs to rotate on a GPU: eight times its L2 cache, as closed gates leave much of each unread."""
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, math.ceil(8 * cache / input_bytes))


def measure(benchmark, step: Step, inputs: Sequence[Workload], quick: bool, ours: Step | None = None) -> None:
    """Times ``step`` on the ``inputs`` in turn; of a rival, in turn with ``ours`` too, as machines have moods."""
    device = inputs[0].labels.device.type
    turns = itertools.cycle(inputs)

    def run() -> None:
        step.and_clear(next(turns))

    def run_ours() -> None:
        ours.and_clear(next(turns))

    def to_the_end(function: Callable[[], None]) -> float:
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def run_to_the_end() -> None:
        to_the_end(run)

    our_seconds: list[float] = []

    def before_each_round() -> None:
        if ours is not None:
            our_seconds.append(to_the_end(run_ours))

    for _ in range(0 if quick else len(inputs)):
        run_to_the_end()
    start = time.perf_counter()
    run_to_the_end()
    rounds = 1 if quick else min(50, max(3, int(SECONDS / (time.perf_counter() - start))))
    benchmark.extra_info["quick"] = quick
    benchmark.pedantic(run_to_the_end, setup=before_each_round, rounds=rounds)
    if benchmark.enabled:
        benchmark.extra_info |= MEASUREMENTS[device](run, step, inputs[0], rounds)
        if our_seconds and device == "cuda":
            our_seconds = [device_seconds(run_ours) for _ in range(rounds)]
        if our_seconds:
            benchmark.extra_info["our_seconds"] = statistics.median(our_seconds)
            benchmark.extra_info["our_spread"] = spread(our_seconds)


def measure_cuda(run: Callable[[], None], step: Step, workload: Workload, rounds: int) -> dict[str, float]:
    return {
        "host_seconds": statistics.median(host_seconds(run) for _ in range(rounds)),
        "device_seconds": statistics.median(device_seconds(run) for _ in range(rounds)),
        "launches": launches(run),
        "synchronisations": synchronisations(run),
        "peak_extra_bytes": peak_allocated(step, workload),
    }


def measure_cpu(run: Callable[[], None], step: Step, workload: Workload, rounds: int) -> dict[str, float]:
    peak = peak_resident(step, workload)
    return {} if peak is None else {"peak_extra_bytes": peak}


MEASUREMENTS = {"cuda": measure_cuda, "cpu": measure_cpu}


# --- time ----------------------------------------------------------------------------------------------------------


def spread(seconds: Sequence[float]) -> float:
    """The interquartile range by the median."""
    if len(seconds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, method="inclusive")
    return (high - low) / middle


def host_seconds(run: Callable[[], None]) -> float:
    """Until ``run`` returns, starting from an idle device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def device_seconds(run: Callable[[], None]) -> float:
    """Of the work that ``run`` queues; where ``run`` waits for the device, the host's time after that is in it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(PLUG_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


# --- launches ------------------------------------------------------------------------------------------------------


def launches(run: Callable[[], None]) -> int:
    """Kernels, fills and copies on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profile.events())


def synchronisations(run: Callable[[], None]) -> int:
    """How often torch waited for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


# --- memory --------------------------------------------------------------------------------------------------------


def peak_allocated(step: Step, workload: Workload) -> int:
    """Most bytes that torch held on the device beyond the inputs; the gradients that the step leaves are in it."""
    step.clear(workload)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(workload)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_resident(step: Step, workload: Workload) -> int | None:
    """The same by the resident set of the process; misses what malloc had kept of earlier steps. None but on Linux."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    step.clear(workload)
    ops.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        clear.write_text("5")  # the peak starts anew
    except (OSError, AttributeError):
        return None
    before = resident(status, "VmRSS")
    step(workload)
    return max(0, resident(status, "VmHWM") - before)


def resident(status: Path, key: str) -> int:
    """Bytes."""
    return int(re.search(rf"{key}:\s*(\d+) kB", status.read_text())[1]) * 1024
