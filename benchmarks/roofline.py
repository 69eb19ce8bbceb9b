"""The least time a machine needs for an op: the fewest bytes and operations, at the rates that it reaches itself.

Bytes: what must be read once and written once if every cache were perfect. A pyramid counts where an open region's
samples touch it; a gradient counts in full, its zeros too. Operations: additions and multiplications of the separable
form of RoIAlign, on fp32 lanes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torchvision.ops.poolers import LevelMapper
from workloads import SCALES, Workload

BINS, SAMPLES = 7, 2  # an axis; a bin and axis
TAPS = 2 * SAMPLES  # pixels a bin reads along an axis


@dataclass(frozen=True)
class Work:
    read: int  # bytes
    written: int
    operations: int

    def describe(self, seconds: float, device: torch.device) -> dict[str, float]:
        """What goes into the record: the floor, in seconds, and the share of it that ``seconds`` achieve."""
        bandwidth, rate = copy_bandwidth(device, torch.get_num_threads()), compute_rate(device, torch.get_num_threads())
        memory_seconds = (self.read + self.written) / bandwidth
        compute_seconds = self.operations / rate
        floor = max(memory_seconds, compute_seconds)
        return {
            "bytes": self.read + self.written,
            "operations": self.operations,
            "copy_bytes_per_second": bandwidth,
            "operations_per_second": rate,
            "memory_floor_seconds": memory_seconds,
            "floor_seconds": floor,
            "share_of_floor": floor / seconds,
        }


# --- rates of the machine ------------------------------------------------------------------------------------------


def fastest(function, device: torch.device, rounds: int = 10) -> float:
    """Seconds."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


@lru_cache
def copy_bandwidth(device: torch.device, threads: int) -> float:
    """Bytes read and written a second, by ``copy_`` of 256 MiB (a GPU: 4 GiB, which hides the launch)."""
    source = torch.zeros((4 << 30 if device.type == "cuda" else 256 << 20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / fastest(lambda: target.copy_(source), device)


@lru_cache
def compute_rate(device: torch.device, threads: int) -> float:
    """fp32 operations a second, by a product of matrices without tensor cores."""
    size = 8192 if device.type == "cuda" else 1024
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    matrix = torch.ones((size, size), device=device)
    try:
        return 2 * size**3 / fastest(lambda: matrix @ matrix, device, rounds=5)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


# --- work of the ops, forward and backward -------------------------------------------------------------------------


def region_distill(workload: Workload, gates: Tensor) -> Work:
    maps, opened = workload.student_features, gates[:, 0]
    pixels = touched_pixels(workload, opened)
    channels = maps[0].shape[1]
    taps = channels * int(opened.sum()) * separable_operations()
    read, written = heads(workload, gates)
    return Work(
        read=read + 2 * pixels * channels * maps[0].element_size(),
        written=written + sum(f.nbytes for f in maps),
        operations=2 * taps + pixels * channels,
    )


def pooled_distill(workload: Workload, gates: Tensor) -> Work:
    student, _ = workload.pooled
    read, written = heads(workload, gates)
    values = int(gates[:, 0].sum()) * student[0].numel()
    return Work(read + 2 * values * student.element_size(), written + student.nbytes, 4 * values)


def roi_align(workload: Workload) -> Work:
    maps = workload.student_features
    everything = torch.ones_like(workload.labels, dtype=torch.bool)
    channels, size = maps[0].shape[1], maps[0].element_size()
    regions = len(workload.labels)
    pooled = regions * channels * BINS**2 * size
    read = touched_pixels(workload, everything) * channels * size
    return Work(
        read=read + pooled,
        written=pooled + sum(f.nbytes for f in maps),
        operations=2 * regions * channels * separable_operations(),
    )


def gaussian(workload: Workload) -> Work:
    values = 0
    for _level, (scale, feature) in enumerate(zip(SCALES, workload.student_features)):
        inside = torch.zeros((feature.shape[0], *feature.shape[2:]), dtype=torch.bool)
        for image, boxes in enumerate(workload.gt_per_image):
            for x1, y1, x2, y2 in (boxes.cpu() * scale).tolist():
                # Pixels at integer positions within the box; none is negative.
                inside[image, -int(-y1 // 1) : int(y2) + 1, -int(-x1 // 1) : int(x2) + 1] = True
        values += int(inside.sum()) * feature.shape[1]
    maps = workload.student_features
    return Work(2 * values * maps[0].element_size(), sum(f.nbytes for f in maps), 5 * values)


def heads(workload: Workload, gates: Tensor) -> tuple[int, int]:
    """Bytes (read, written) of logits, deltas and boxes: the gates need the foreground's, the gradients are dense."""
    logits, deltas = workload.student_logits, workload.student_deltas
    foreground = int((workload.labels > 0).sum())
    a_region = 2 * (logits.shape[1] + 4) * logits.element_size() + 2 * 4 * 4  # and two boxes of four floats
    return foreground * a_region + workload.labels.nbytes, logits.nbytes + deltas.nbytes


def separable_operations() -> int:
    """A region and channel, one direction: rows into bins, then columns into bins; a tap multiplies and adds."""
    columns = BINS * TAPS
    return 2 * TAPS * (BINS * columns + BINS * BINS)


def touched_pixels(workload: Workload, opened: Tensor) -> int:
    """Pixels of one pyramid, all images together, that the samples of the open regions read; each counts once."""
    boxes = torch.cat(workload.boxes)[opened].cpu()
    image = torch.cat([torch.full((len(b),), i) for i, b in enumerate(workload.boxes)])[opened.cpu()]
    levels = LevelMapper(2, len(SCALES) + 1)([boxes]) if len(boxes) else image
    count = 0
    for level, (scale, feature) in enumerate(zip(SCALES, workload.student_features)):
        here = levels == level
        height, width = feature.shape[2:]
        touched = torch.zeros((feature.shape[0], height, width), dtype=torch.bool)
        rows = taps_of(boxes[here, 1] * scale, boxes[here, 3] * scale, height)
        columns = taps_of(boxes[here, 0] * scale, boxes[here, 2] * scale, width)
        touched[image[here][:, None, None], rows[:, :, None], columns[:, None, :]] = True
        count += int(touched.sum())
    return count


def taps_of(low: Tensor, high: Tensor, length: int) -> Tensor:
    """(R, 28) pixels that the samples between ``low`` and ``high`` read along an axis; boxes within the image."""
    extent = (high - low).clamp(min=1)
    offsets = (torch.arange(BINS * SAMPLES) + 0.5) / (BINS * SAMPLES)
    first = (low[:, None] + extent[:, None] * offsets).clamp(min=0).floor().long()
    return torch.cat((first, first + 1), 1).clamp(max=length - 1)
