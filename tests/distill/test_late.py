"""Values that are read when they have arrived."""

from __future__ import annotations

import copy

import pytest
import torch

from tardkd.distill import late
from tardkd.distill.late import LateReader


def test_on_a_cpu_values_are_judged_at_once() -> None:
    seen: list[list[float]] = []
    LateReader().read(torch.tensor([1.0, 2.0]), seen.append)
    assert seen == [[1.0, 2.0]]


class OnTheWay(torch.Tensor):
    """A tensor that says it were on a GPU."""

    @property
    def is_cuda(self) -> bool:
        return True


class Arrived:
    """A copy of it on the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def tolist(self) -> list:
        return self.tensor.as_subclass(torch.Tensor).tolist()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    monkeypatch.setattr(late, "HostCopy", Arrived)
    return torch.tensor([1.0, 2.0]).as_subclass(OnTheWay)


def test_of_a_gpu_they_are_judged_later_and_once(slow: torch.Tensor) -> None:
    seen: list[list[float]] = []
    reader = LateReader()
    reader.read(slow, seen.append)
    assert seen == []
    reader.settle()
    reader.settle()
    assert seen == [[1.0, 2.0]]


def test_it_can_be_waited_for(slow: torch.Tensor) -> None:
    seen: list[list[float]] = []
    LateReader().read(slow, seen.append, wait=True)
    assert seen == [[1.0, 2.0]]


def test_a_copy_of_a_module_does_not_judge_again(slow: torch.Tensor) -> None:
    seen: list[list[float]] = []
    reader = LateReader()
    reader.read(slow, seen.append)
    copy.deepcopy(reader).settle()
    assert seen == []
