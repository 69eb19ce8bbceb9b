"""The back ends every op test runs on."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import pytest
import torch

import tardkd.ops
import tardkd.ops.reference


class Backend(NamedTuple):
    name: str
    ops: ModuleType  # offers the functions of tardkd.ops
    device: torch.device


BACKENDS = {
    "reference": Backend("reference", tardkd.ops.reference, torch.device("cpu")),
    "cpu": Backend("cpu", tardkd.ops, torch.device("cpu")),
}


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]


@pytest.fixture(params=[name for name in BACKENDS if name != "reference"])
def kernel(request: pytest.FixtureRequest) -> Backend:
    """The back ends that the reference is the measure of."""
    return BACKENDS[request.param]


@pytest.fixture
def cpu() -> Backend:
    return BACKENDS["cpu"]


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """The scenes are too small to share out; test_properties shows that threads change no bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
