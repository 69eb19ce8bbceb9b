"""Builds and imports the module that runs the kernels' PTX on the CPU (csrc/ptx_on_cpu), where there is an nvcc.

What nvcc made of the kernels is run as it stands: addresses, masks, barriers and the order of memory are those of the
compiler's code. Every access is checked for alignment, for bounds, which in global memory are those of the call's
tensors, for shared memory that nobody has written, and for races; whatever breaks a rule ends the launch with an error.
The environment variable ``TARDKD_PTX_SEED`` makes blocks, warps and parts of warps run in a random order.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from cuda_on_cpu import ROOT, build
from torch import Tensor

from tardkd.ops import cuda, native


class Bounded:
    """The functions of the module. A launch may touch what was described since the last one, and nothing else."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name)

        def call(*arguments: Any) -> Any:
            launches = len(self._module.launches())
            try:
                return function(*arguments)
            finally:
                if len(self._module.launches()) != launches:
                    self._module.forbid_all()

        return call


@functools.cache
def load() -> ModuleType:
    if not (os.environ.get("CUDACXX") or shutil.which("nvcc")):
        pytest.skip("no nvcc, which turns the CUDA kernels into PTX")
    return build("ptx_on_cpu", ROOT / "build" / "ptx-on-cpu")


def start(architecture: int, monkeypatch: pytest.MonkeyPatch) -> Bounded:
    """The functions, whose launches run the PTX of this architecture and are held to the tensors described to them."""
    module = load()
    module.reset()
    module.forbid_all()
    module.set_architecture(architecture)
    module.set_seed(int(os.environ.get("TARDKD_PTX_SEED", "0")))

    plain = native.describe

    def describe(tensor: Tensor | None) -> native.Description | None:
        if tensor is not None and tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            module.allow(tensor.data_ptr(), (last + 1) * tensor.element_size(), tensor.element_size())
        return plain(tensor)

    monkeypatch.setattr(native, "describe", describe)
    monkeypatch.setattr(cuda, "describe", describe)
    return Bounded(module)
