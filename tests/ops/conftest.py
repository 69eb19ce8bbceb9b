"""The back ends every op test runs on."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import cuda_on_cpu
import ptx_on_cpu
import pytest
import torch

import tardkd.ops
import tardkd.ops.reference
from tardkd.ops.cuda import CudaKernels
from tardkd.ops.fallback import KERNEL_DEVICES
from tardkd.ops.registry import IMPLEMENTATIONS


class Backend(NamedTuple):
    name: str
    ops: ModuleType  # offers the functions of tardkd.ops
    device: torch.device


BACKENDS = {
    "reference": Backend("reference", tardkd.ops.reference, torch.device("cpu")),
    "cpu": Backend("cpu", tardkd.ops, torch.device("cpu")),
    "cuda-on-cpu": Backend("cuda-on-cpu", tardkd.ops, torch.device("cpu")),
    "cuda-as-ptx-75": Backend("cuda-as-ptx-75", tardkd.ops, torch.device("cpu")),
    "cuda-as-ptx-90": Backend("cuda-as-ptx-90", tardkd.ops, torch.device("cpu")),
    "cuda": Backend("cuda", tardkd.ops, torch.device("cuda")),
}
# The CUDA kernels without a GPU: their source run by csrc/cuda_on_cpu, and what nvcc makes of it by csrc/ptx_on_cpu.
STAND_INS = ["cuda-on-cpu"]
STAND_INS += [pytest.param(name, marks=pytest.mark.ptx) for name in ("cuda-as-ptx-75", "cuda-as-ptx-90")]
KERNELS = ["cpu", *STAND_INS, pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=["reference", *KERNELS])
def backend(request: pytest.FixtureRequest) -> Backend:
    return ready(request)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Backend:
    """The back ends that the reference is the measure of."""
    return ready(request)


def ready(request: pytest.FixtureRequest) -> Backend:
    if request.param not in ("reference", "cpu", "cuda"):
        take_place(request.param, request.getfixturevalue("monkeypatch"))
    if request.param == "cuda" and not ("cuda" in KERNEL_DEVICES and torch.cuda.is_available()):
        pytest.skip("no CUDA device, or no CUDA kernels in this build")
    return BACKENDS[request.param]


def take_place(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """For the length of a test the CUDA kernels, run by the stand-in of this name, take the place of the CPU's."""
    if name == "cuda-on-cpu":
        module = cuda_on_cpu.load()
        module.reset()
    else:
        module = ptx_on_cpu.start(int(name.removeprefix("cuda-as-ptx-")))
    monkeypatch.setitem(IMPLEMENTATIONS, "CPU", CudaKernels(module, lambda device: 0))
    return module


@pytest.fixture(name="cuda_on_cpu")
def cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The functions of csrc/cuda_on_cpu, which are in the CPU's place."""
    return take_place("cuda-on-cpu", monkeypatch)


@pytest.fixture(params=STAND_INS)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The same, and those that run the PTX."""
    return take_place(request.param, monkeypatch)


@pytest.fixture(params=["cpu", *STAND_INS])
def host(request: pytest.FixtureRequest) -> Backend:
    """The kernels that take CPU tensors."""
    return ready(request)


@pytest.fixture
def cpu() -> Backend:
    return BACKENDS["cpu"]


@pytest.fixture
def deterministic():
    """Every run gives the same bits."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """The scenes are too small to share out; test_properties shows that threads change no bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
