"""What the benchmarks run on: device, precision and memory format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import torch

import tardkd


@dataclass(frozen=True)
class Case:
    device: str
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    first: bool = False  # runs before the others, and the compiled rivals on these only: compiling takes long

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "NCHW"
        return f"{self.device} {str(self.dtype).removeprefix('torch.')} {layout}"


def has_cuda() -> bool:
    return torch.cuda.is_available() and "cuda" in tardkd.build_info()["kernel_devices"]


CASES = [Case("cpu", first=True), Case("cpu", channels_last=True), Case("cpu", torch.bfloat16)]
if has_cuda():
    CASES = [
        Case("cuda", first=True),
        Case("cuda", torch.bfloat16, channels_last=True, first=True),
        Case("cuda", channels_last=True),
        Case("cuda", torch.bfloat16),
        Case("cuda", torch.float16),
        Case("cuda", torch.float16, channels_last=True),
        *CASES,
    ]


def with_sides(sides: Iterable[str]) -> list:
    """Parameters (case, side): every side on every case, but compiled rivals on the first ones only."""
    return [
        pytest.param(case, side, id=f"{case}-{side}".replace(" ", "-"))
        for case in CASES
        for side in sides
        if case.first or not side.endswith("compiled")
    ]
