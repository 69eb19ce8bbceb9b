"""Benchmarks run on two threads; ``--quick`` shrinks the inputs, for checking that everything runs."""

from __future__ import annotations

import pytest
import torch
import workloads


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny inputs: correctness only, the times mean nothing")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture(scope="session")
def coco(quick: bool) -> workloads.Workload:
    torch.set_num_threads(2)
    return workloads.coco(height=160, width=224, regions=64, channels=16) if quick else workloads.coco()
