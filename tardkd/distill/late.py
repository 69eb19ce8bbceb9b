"""Values that a check wants to see, read when they have arrived on the host, so that nothing waits for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tardkd.device import HostCopy


class LateReader:
    """Hands values to those who judge them: on a CPU at once, of a GPU when :meth:`settle` is called.

    A judge that raises does so there.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[HostCopy, Callable[[list], None]]] = []

    def read(self, values: Tensor, judge: Callable[[list], None], *, wait: bool = False) -> None:
        """Give ``values``, of any shape, to ``judge`` as a list; with ``wait`` a GPU is waited for, too."""
        self._waiting.append((HostCopy(values), judge))
        if wait or not values.is_cuda:
            self.settle()

    def settle(self) -> None:
        """Let all that has been read be judged."""
        waiting, self._waiting = self._waiting, []
        for values, judge in waiting:
            judge(values.tolist())

    def __deepcopy__(self, memo: dict[int, Any]) -> LateReader:
        return LateReader()
