"""The tools beside the tests of the kernels' PTX: that they see what is there, and say so if a fault is not caught."""

from __future__ import annotations

import re

import ptx
import ptx_on_cpu
import pytest
from ops.test_launches import STEPS

from tardkd.ops.cuda import CudaKernels
from tardkd.ops.registry import IMPLEMENTATIONS

pytestmark = pytest.mark.ptx
RUNS = {"distribution": ptx.step_of(STEPS["distribution"])}


@pytest.fixture
def module(monkeypatch):
    module = ptx_on_cpu.start(90)
    monkeypatch.setitem(IMPLEMENTATIONS, "CPU", CudaKernels(module, lambda device: 0))
    yield module
    module.restore()


def test_a_kernel_without_a_barrier_is_caught(module, capsys):
    outcomes = ptx.mutants(["distribution_loss_kernel"], module, RUNS)
    assert all(outcome.how for outcome in outcomes)
    printed = capsys.readouterr().out
    assert printed.count("bar.sync 0: race: ") >= 3
    assert printed.count("read through the first-level cache") >= 1
    assert re.search("atom.acq_rel.*race: read after write of another block", printed)


def test_a_fault_that_nothing_catches_is_reported(module, monkeypatch):
    """Such as another way to write the same."""
    monkeypatch.setattr(ptx, "MUTATIONS", [(re.compile(r"bar\.sync\s+0"), "barrier.sync 0")])
    outcomes = ptx.mutants(["distribution_loss_kernel"], module, RUNS)
    assert len(outcomes) >= 3 and not any(outcome.how for outcome in outcomes)
    [*_, row] = ptx.table(outcomes)
    count = len(outcomes)
    assert re.search(rf"\| {count} \| 0 \| 0 \| {count}: \w+\.cuh?:\d+", row)


@pytest.mark.parametrize(
    "after, nothing",
    [
        ("st.global.f32 [%rd1], %f1;", True),
        ("st.shared.f32 [%r1], %f1;", False),
        ("@%p1 bra $L_1;\nret;\n$L_1:\nld.shared.f32 %f1, [%r1];", False),
        ("bra.uni $L_1;\nld.shared.f32 %f1, [%r1];\n$L_1:\nld.global.nc.f32 %f1, [%rd1];", True),
        ("ret;\nld.shared.f32 %f1, [%r1];", True),
        ("ld.global.cg.f32 %f1, [%rd1];", False),
    ],
)
def test_barriers_with_nothing_to_order(after, nothing):
    assert ptx.orders_nothing(["bar.sync 0;", *after.split("\n"), "ret;", "}"], 0) == nothing


def test_coverage_names_what_never_ran(module):
    module.reset_counts()
    RUNS["distribution"]()
    lines = list(ptx.covered(module.kernels()))
    assert any(re.match(r"distribution_loss_kernel<float>: \d+ of \d+ instructions ran", line) for line in lines)
    assert any("distribution.cu:" in line and "never did" in line for line in lines)
