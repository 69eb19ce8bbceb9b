"""What only a GPU can show. Skipped, with the reason, where there is none or this build has no kernels for it."""

from __future__ import annotations

import os

import pytest
import torch

import tardkd


def missing() -> str | None:
    """What these tests lack here."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if "cuda" not in tardkd.build_info()["kernel_devices"]:
        return "this build of tardkd has no CUDA kernels"
    return None


@pytest.fixture(autouse=True, scope="session")
def gpu():
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def poisoned_memory(gpu):
    """What torch.empty returns holds NaN, so that an element nobody writes shows."""
    if "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:  # else nothing is used twice
        large = torch.full((1 << 26,), float("nan"), device="cuda")
        small = [torch.full((1 << 16,), float("nan"), device="cuda") for _ in range(32)]  # these come from another pool
        del large, small
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
