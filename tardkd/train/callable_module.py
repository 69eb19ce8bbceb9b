"""A module that is called as its function of the same name is.

``tardkd.train.evaluate`` is a module, which programs import from, and the function of the package's API. Which of the
two an attribute of a package is would otherwise depend on what has been imported before.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A class for ``sys.modules[__name__].__class__``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)
