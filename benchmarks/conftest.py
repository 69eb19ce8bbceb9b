"""Options, the inputs, and the end of time. ``--quick`` shrinks the inputs, for checking that everything runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # for its table of tolerances

import timing
import workloads
from cases import CASES, Case

QUICK = dict(height=160, width=224, regions=64, channels=16)
START = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny inputs: correctness only, the times mean nothing")
    parser.addoption("--sweep", action="store_true", help="growth curves too")
    parser.addoption("--threads", type=int, default=2, help="of the CPU; default 2")
    parser.addoption("--budget", type=float, default=float("inf"), help="seconds; what would start later is skipped")
    parser.addoption(
        "--backend", help="of the compiled rivals; default inductor, with --quick aot_eager, which only traces"
    )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Results are published: what processor it was matters, not whose."""
    machine_info.pop("node", None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What matters most comes first, so that it is there when the time is over."""

    def rank(item: pytest.Item) -> tuple[bool, ...]:
        parameters = item.callspec.params
        if "side" not in parameters:  # a training step
            return parameters["device"] != CASES[0].device, False, False, False
        case: Case = parameters.get("case", CASES[0])
        compiled = parameters["side"].endswith("compiled")
        return case.device != CASES[0].device, "curve" in parameters, not case.first or "sizes" in parameters, compiled

    def wanted(item: pytest.Item) -> bool:
        parameters = item.callspec.params
        if "curve" in parameters:
            return config.getoption("--sweep")
        if not parameters.get("case", CASES[0]).first and parameters.get("gate") == "foreground":
            return False  # between the other two
        # Tracing takes seconds; the gates differ little to it.
        slow = parameters.get("side", "").endswith("compiled") and parameters.get("gate", "either") != "either"
        return not (slow and config.getoption("--quick"))

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = sorted(filter(wanted, items), key=rank)


@pytest.fixture(autouse=True)
def within_budget(request: pytest.FixtureRequest) -> None:
    if time.monotonic() - START > request.config.getoption("--budget"):
        pytest.skip("no time was left")


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> int:
    torch.set_num_threads(request.config.getoption("--threads"))
    return torch.get_num_threads()


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def compiled(request: pytest.FixtureRequest, quick: bool) -> Callable:
    """``torch.compile``, forgetting what was compiled before: it stops compiling what it has seen in too many forms."""
    torch.compiler.reset()
    backend = request.config.getoption("--backend") or ("aot_eager" if quick else "inductor")

    def compile(function: Callable) -> Callable:
        return torch.compile(lambda *arguments: function(*arguments), backend=backend)

    return compile


@lru_cache(maxsize=1)
def made(make: Callable[..., workloads.Workload], **sizes: int | float) -> workloads.Workload:
    return make(**sizes)


@pytest.fixture(scope="session")
def inputs_of(quick: bool) -> Callable[..., list[workloads.Workload]]:
    """COCO's shapes, or others, as a case wants them; more than one where they are to rotate."""

    @lru_cache(maxsize=1)
    def inputs(case: Case, make: Callable = workloads.training, **sizes: int | float) -> list[workloads.Workload]:
        one = made(make, **{**sizes, **QUICK} if quick else sizes)
        bytes_of_maps = sum(f.numel() for f in one.student_features) * 2 * case.dtype.itemsize
        copies = timing.copies_needed(case.device, bytes_of_maps)
        return [one.to(case.device, case.dtype, case.channels_last) for _ in range(copies)]

    return inputs
