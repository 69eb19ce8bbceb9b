"""What vendors' data sheets and programming guides say of GPUs, for predictions."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    name: str
    capability: str
    multiprocessors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes a second of memory
    cache: int  # bytes of the second level that one multiprocessor's data may be in
    shared: int  # bytes a multiprocessor
    threads: int  # that a multiprocessor holds
    registers: int = 65536  # of 32 bits, a multiprocessor
    schedulers: int = 4  # a multiprocessor; each issues an instruction of a warp a clock
    l2_bytes: int = 64  # that a multiprocessor gets from the cache a clock


# The caches of H100, H200 and A100 are in two halves, of which each may have to hold what the other does.
DEVICES = {
    "H100": Device("H100 SXM 80 GB", "9.0", 132, 1.98e9, 3.35e12, 25 << 20, 228 << 10, 2048),
    "H200": Device("H200 SXM 141 GB", "9.0", 132, 1.98e9, 4.8e12, 25 << 20, 228 << 10, 2048),
    "A100": Device("A100 SXM 80 GB", "8.0", 108, 1.41e9, 2.039e12, 20 << 20, 164 << 10, 2048),
    "T4": Device("T4", "7.5", 40, 1.59e9, 320e9, 4 << 20, 64 << 10, 1024),
}
