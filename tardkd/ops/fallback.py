"""Which devices have kernels; the others are served by the plain PyTorch reference."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from .extension import native_module
from .registry import IMPLEMENTATIONS

KERNEL_DEVICES = frozenset(key.lower() for key in IMPLEMENTATIONS)

# By device type: why the kernels cannot run on its device of an index, such as an old driver; "" where they can.
PROBES: dict[str, Callable[[int], str]] = {}
if "cuda" in KERNEL_DEVICES:
    PROBES["cuda"] = native_module.cuda.problem_of


def has_kernels(device: torch.device) -> bool:
    """Whether the native kernels run on ``device``. Warns once if not.

    Tensors on ``meta`` have shapes alone, which the registered ops know how to work out.
    """
    if device.type not in KERNEL_DEVICES and device.type != "meta":
        if not torch.compiler.is_compiling():
            _warn(device.type, f"this build of tardkd has no {device.type} kernels")
        return False
    return device.type not in PROBES or _can_run(device.type, device.index or 0)


@torch.compiler.assume_constant_result  # the compiler need not look into it
def _can_run(device_type: str, index: int) -> bool:
    device = f"{device_type}:{index}"
    if device not in _problems:
        _problems[device] = PROBES[device_type](index)
    if _problems[device]:
        _warn(device, f"the kernels of this build of tardkd cannot run on {device} ({_problems[device]})")
    return not _problems[device]


_problems: dict[str, str] = {}  # by device
_warned: set[str] = set()


def _warn(what: str, why: str) -> None:
    if what not in _warned:
        _warned.add(what)
        warnings.warn(f"{why}: its ops run as plain PyTorch there, which is slower", stacklevel=5)
