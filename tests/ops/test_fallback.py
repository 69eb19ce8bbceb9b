"""Devices that the kernels of a build cannot run on."""

from __future__ import annotations

import warnings

import pytest
import torch

import tardkd.ops
from tardkd.ops import fallback, functional

from .scenes import LEVEL_RULE, make_scene

NO_IMAGE = 209  # cudaErrorNoKernelImageForDevice


@pytest.fixture
def probed(monkeypatch):
    """The devices that were asked about. The CPU stands for one that the kernels cannot run on."""
    asked = []

    def problem_of(index: int) -> str:
        asked.append(index)
        return "no kernel image is available for execution on the device"

    monkeypatch.setitem(fallback.PROBES, "cpu", problem_of)
    monkeypatch.setattr(fallback, "_problems", {})
    monkeypatch.setattr(fallback, "_warned", set())
    return asked


def align(scene):
    return tardkd.ops.multiscale_roi_align(
        scene.student_features, scene.proposals, scales=scene.student_scales, **LEVEL_RULE
    )


def test_the_reference_takes_their_place_with_one_warning(probed, cuda_on_cpu):
    scene = make_scene(7).to(torch.float32)
    with pytest.warns(
        UserWarning, match=r"cannot run on cpu:0 \(no kernel image is available.*\): its ops run as plain"
    ):
        pooled = align(scene)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = align(scene)
        tardkd.ops.region_distill_loss(*scene.inputs, **scene.scales, **LEVEL_RULE)
    expected = tardkd.ops.reference.multiscale_roi_align(
        scene.student_features, scene.proposals, scales=scene.student_scales, **LEVEL_RULE
    )
    assert torch.equal(pooled, expected) and torch.equal(again, expected)
    assert cuda_on_cpu.launches() == [] and probed == [0]


def test_they_are_found_while_compiling(probed):
    """In one graph."""
    device = torch.device("cpu")
    compiled = torch.compile(lambda x: x + functional.has_kernels(device), backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert compiled(torch.zeros(())).item() == 0
    assert probed == [0]


def test_the_problem_is_in_the_words_of_cuda_and_leaves_no_error_behind(cuda_on_cpu):
    assert cuda_on_cpu.problem_of(0) == ""
    cuda_on_cpu.set_kernel_error(NO_IMAGE)
    try:
        assert cuda_on_cpu.problem_of(0) == "no kernel image is available for execution on the device"
        assert cuda_on_cpu.last_error() == 0
    finally:
        cuda_on_cpu.set_kernel_error(0)
    assert cuda_on_cpu.problem_of(1) == "invalid device ordinal"  # there is one device
    assert cuda_on_cpu.last_error() == 0
