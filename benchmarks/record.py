"""What every benchmark says of itself in ``extra_info``; the report is made of nothing else."""

from __future__ import annotations

import platform
from typing import Any

import torch
import torchvision
from cases import Case
from workloads import Workload

import tardkd


def describe(benchmark, op: str, side: str, case: Case, workload: Workload, gate: str = "") -> dict[str, Any]:
    """``side``: "tardkd" or the rival. Returns ``extra_info``, for more to be added."""
    benchmark.group = " / ".join(filter(None, (op, str(case), gate and f"gate {gate}")))
    benchmark.extra_info |= {
        "op": op,
        "side": side,
        "case": str(case),
        "gate": gate,
        "sizes": workload.sizes,
        **about_the_run(case.device),
    }
    return benchmark.extra_info


def about_the_run(device: str) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "tardkd": tardkd.build_info()["version"],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def seconds_of(benchmark) -> float:
    """What a ratio is made of: the time on the device where it is known, else the wall's."""
    return benchmark.extra_info.get("device_seconds", benchmark.stats.stats.median)
