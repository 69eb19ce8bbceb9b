"""Builds and imports the module that runs the kernels' PTX on the CPU (csrc/ptx_on_cpu), where there is an nvcc.

What nvcc made of the kernels is run as it stands: addresses, masks, barriers and the order of memory are those of the
compiler's code. Every access is checked for alignment, for bounds, which in global memory are those of the call's
tensors, for shared memory that nobody has written, and for races; whatever breaks a rule ends the launch with an error.
The environment variable ``TARDKD_PTX_SEED`` makes blocks, warps and parts of warps run in a random order.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from cuda_on_cpu import ROOT, build


class Instruction(NamedTuple):
    """A row of a kernel's ``code``, as csrc/ptx_on_cpu/module.cpp gives it."""

    text: str
    source: str  # "pool.cuh:12"
    line: int  # of the PTX
    warps: int  # that ran it
    lanes: int
    units: int  # of its accesses: sectors or wavefronts
    fewest: int
    shared_addresses: int  # lanes of global accesses with the address of another lane

    @property
    def opcode(self) -> list[str]:
        return re.sub(r"^@!?\S+\s+", "", self.text).partition("\t")[0].split()[0].split(".") if self.text else [""]

    @property
    def access(self) -> str:
        """Such as "global load"; "" if it accesses no memory."""
        kind = {"ld": "load", "st": "store", "atom": "atomic", "red": "atomic"}.get(self.opcode[0])
        spaces = {"global", "shared", "local", "param"} & set(self.opcode)
        return f"{spaces.pop() if spaces else 'generic'} {kind}" if kind else ""

    @property
    def kind(self) -> str:
        name, *_, type_ = self.opcode if len(self.opcode) > 1 else (*self.opcode, "")
        if self.access:
            return self.access.partition(" ")[0] + " memory"
        if name in ("bra", "ret", "exit"):
            return "branch"
        if name in ("bar", "membar", "fence", "shfl", "vote"):
            return "synchronisation"
        if name in ("div", "rem", "sqrt", "rcp"):
            return "division"
        if name in ("cvt", "cvta", "mov", "selp"):
            return "conversion and move"
        return {"f32": "fp32", "f64": "fp64"}.get(type_, "integer of 64 bits" if "64" in type_ else "integer")


class Bounded:
    """The functions of the module. A launch may touch the tensors that its call has read, and nothing else."""

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


def start(architecture: int) -> Bounded:
    """The functions, whose launches run the PTX of this architecture and are held to their tensors."""
    module = load()
    module.reset()
    module.forbid_all()
    module.set_bounded(True)
    module.set_architecture(architecture)
    module.set_seed(int(os.environ.get("TARDKD_PTX_SEED", "0")))
    return Bounded(module)
