"""Streams, graphs, devices: the kernels run where and when the caller says, and never make the host wait."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from .cases import STEPS, assert_identical, make_case, run

pytestmark = pytest.mark.gpu

HALF_A_SECOND = 10**9  # cycles, about


@pytest.fixture(params=["default", "deterministic"])
def mode(request):
    if request.param == "deterministic":
        request.getfixturevalue("deterministic")
    return request.param


@pytest.mark.parametrize("name", STEPS)
def test_the_callers_stream(name):
    """The inputs get their values late, in the same stream: work in any other would see zeros."""
    case = make_case(211)
    expected = run(name, case)
    values = [tensor.detach().clone() for tensor in case.tensors]
    case.copy_([torch.zeros_like(value) for value in values])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(HALF_A_SECOND // 10)
        case.copy_(values)
        actual = run(name, case)
    torch.cuda.synchronize()
    assert_identical(actual, expected)


@pytest.mark.parametrize("name", STEPS)
def test_the_host_does_not_wait(name, mode):
    case = make_case(212)
    run(name, case)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(HALF_A_SECOND)
    run(name, case)
    done.record()
    assert not done.query(), "the step returned only when the device had finished"
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", STEPS)
def test_torch_sees_no_synchronisation(name, mode):
    case = make_case(213)
    run(name, case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(name, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", STEPS)
def test_graphs(name, mode):
    """Captured forward and backward; replayed on other values, twice each, so that nothing may be left over."""
    case = make_case(214)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run(name, case)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(name, case)
    for seed in (215, 216):
        other = make_case(seed)
        case.copy_(other.tensors)
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        expected = run(name, other)
        assert_identical(captured, expected)


def test_many_launches_from_threads_on_streams_of_their_own():
    """A counter or a scratch buffer that two launches share would show."""
    cases = [make_case(217 + index, channels=16) for index in range(4)]
    expected = [{name: run(name, case) for name in STEPS} for case in cases]
    torch.cuda.synchronize()

    def work(index: int):
        with torch.cuda.stream(torch.cuda.Stream()):
            wrong = torch.zeros((), dtype=torch.int64, device="cuda")
            for _ in range(100):
                actual = {name: run(name, cases[index]) for name in STEPS}
                for name, outcome in actual.items():
                    for one, other in zip(outcome.results, expected[index][name].results):
                        wrong += (one != other).sum()
            torch.cuda.current_stream().synchronize()
        return wrong.item(), actual

    with ThreadPoolExecutor(4) as pool:
        for index, (wrong, actual) in enumerate(pool.map(work, range(4))):
            assert wrong == 0
            for name in STEPS:
                assert_identical(actual[name], expected[index][name])


@pytest.mark.parametrize("name", STEPS)
def test_a_device_that_is_not_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("a single CUDA device")
    expected = run(name, make_case(221))
    case = make_case(221, device="cuda:1")
    actual = run(name, case)
    assert torch.cuda.current_device() == 0
    for tensor in (*actual.results, *actual.gradients):
        assert tensor.device == torch.device("cuda:1")
    here = [[tensor.to("cuda:0") for tensor in part] for part in actual]
    assert_identical(actual._make(here), expected)
