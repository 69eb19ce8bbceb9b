"""Functions from checked calls: how an op and its twin in the reference share one signature and one description."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Call = TypeVar("Call")
Result = TypeVar("Result")


def function_of(
    checked: Callable[Arguments, Call], run: Callable[[Call], Result], module: str
) -> Callable[Arguments, Result]:
    """``run`` on what ``checked`` makes of the arguments, as a public function of ``module``.

    It has the name, the signature and the description of ``checked``, and returns what ``run`` returns.
    """

    @functools.wraps(checked)
    def function(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return run(checked(*args, **kwargs))

    returns: Any = inspect.signature(run).return_annotation
    function.__module__ = module
    function.__annotations__ = {**checked.__annotations__, "return": returns}
    function.__signature__ = inspect.signature(checked).replace(return_annotation=returns)  # type: ignore[attr-defined]
    return function
