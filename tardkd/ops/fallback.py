"""Which devices have kernels; the others are served by the plain PyTorch reference."""

from __future__ import annotations

import warnings

import torch

from .registry import IMPLEMENTATIONS

KERNEL_DEVICES = frozenset(key.lower() for key in IMPLEMENTATIONS)


def has_kernels(device: torch.device) -> bool:
    """Whether the native kernels run on ``device``. Warns once per device type if not.

    Tensors on ``meta`` have shapes alone, which the registered ops know how to work out.
    """
    if device.type in KERNEL_DEVICES or device.type == "meta":
        return True
    if not torch.compiler.is_compiling():
        _warn(device.type)
    return False


_warned: set[str] = set()


def _warn(device_type: str) -> None:
    if device_type not in _warned:
        _warned.add(device_type)
        warnings.warn(
            f"this build of tardkd has no {device_type} kernels: its ops run as plain PyTorch there, which is slower",
            stacklevel=5,
        )
