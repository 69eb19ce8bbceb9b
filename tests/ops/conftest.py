"""The back ends every op test runs on."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from cuda_on_cpu import load

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
    "cuda": Backend("cuda", tardkd.ops, torch.device("cuda")),
}
KERNELS = ["cpu", "cuda-on-cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=["reference", *KERNELS])
def backend(request: pytest.FixtureRequest) -> Backend:
    return ready(request)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Backend:
    """The back ends that the reference is the measure of."""
    return ready(request)


def ready(request: pytest.FixtureRequest) -> Backend:
    if request.param == "cuda-on-cpu":
        request.getfixturevalue("cuda_on_cpu")
    if request.param == "cuda" and not ("cuda" in KERNEL_DEVICES and torch.cuda.is_available()):
        pytest.skip("no CUDA device, or no CUDA kernels in this build")
    return BACKENDS[request.param]


@pytest.fixture
def cuda_on_cpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """For the length of a test the CUDA kernels, run by csrc/cuda_on_cpu, take the place of the CPU's."""
    module = load()
    module.reset()
    monkeypatch.setitem(IMPLEMENTATIONS, "CPU", CudaKernels(module, lambda device: 0))
    return module


@pytest.fixture(params=["cpu", "cuda-on-cpu"])
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
