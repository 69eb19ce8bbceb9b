"""A GPU that works while the host goes on: numbers that arrive later, work beside other work. On a CPU all is now."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class HostCopy:
    """A tensor on its way to the host. The device is not waited for until :meth:`tolist` is called."""

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._values = tensor.detach()
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> list:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


@lru_cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def run_beside(device: torch.device, work: Callable[[], Result]) -> Result:
    """Queue ``work`` on a second stream of ``device``, after all that is queued on the current one.

    Before the current stream uses the result it must :func:`join_beside`. As long as the caller's stream stays the same
    one memory is safe without more: what ``work`` allocates is used again by later work alone, which waits here first.
    """
    if device.type != "cuda":
        return work()
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        return work()


def join_beside(device: torch.device) -> None:
    """Let the current stream wait for the second one; the host goes on."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_side_stream(device))
