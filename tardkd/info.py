"""What this installation of tardkd is made of."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("tardkd")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "unknown"


def build_info() -> dict[str, Any]:
    """Version, compiler, CPU instruction set in use, and the CUDA side of the build.

    ``cuda`` tells whether CUDA code was compiled in, ``kernel_devices`` on which device types the fused kernels run
    (the ops run as plain PyTorch on any other). With ``cuda``: ``cuda_runtime``, ``cuda_architectures``,
    ``cuda_devices``.
    """
    from .ops.extension import native_module
    from .ops.fallback import KERNEL_DEVICES

    native = native_module.build_info()
    return {
        "version": __version__,
        **native,
        "cuda": "cuda_runtime" in native,
        "kernel_devices": sorted(KERNEL_DEVICES),
    }
