"""Calls inside a model that are listened to; nothing is left on the model afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def recorded_calls(*modules: nn.Module) -> Iterator[dict[nn.Module, tuple[tuple[Any, ...], Any]]]:
    """Record ``(args, output)`` of the first call of each module; no trace is left on the modules afterwards."""
    calls: dict[nn.Module, tuple[tuple[Any, ...], Any]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.setdefault(module, (args, output))

    handles = [module.register_forward_hook(record) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_method(owner: Any, name: str) -> Iterator[list[tuple[tuple[Any, ...], Any]]]:
    """Record ``(args, output)`` of every call of the method ``name`` of an object, which is none of its own modules."""
    calls: list[tuple[tuple[Any, ...], Any]] = []
    method, is_own = getattr(owner, name), name in vars(owner)

    def record(*args: Any) -> Any:
        calls.append((args, method(*args)))
        return calls[-1][1]

    setattr(owner, name, record)
    try:
        yield calls
    finally:
        if is_own:  # somebody else had put a function of their own onto this object
            setattr(owner, name, method)
        else:
            delattr(owner, name)
