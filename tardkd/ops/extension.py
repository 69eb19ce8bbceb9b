"""The compiled module, or an error that says what to do.

A checkout holds one of its own only after ``pip install -e .``. After ``pip install .`` Python still imports the
checkout where it starts in that folder, as ``python -m pytest`` does; then the installed package's module serves.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parents[1]
NAME = "tardkd._native"


def load_module() -> ModuleType:
    try:
        if PathFinder.find_spec(NAME, [str(PACKAGE)]) is None:
            return installed_module([entry for entry in sys.path if Path(entry).resolve() != PACKAGE.parent])
        return importlib.import_module(NAME)
    except ImportError as error:
        raise ImportError(
            f"tardkd's compiled module cannot be loaded ({error}). Imported from {__file__}: if that is a source tree, "
            'install it ("pip install ." or "pip install -e .")'
        ) from error


def installed_module(paths: Sequence[str]) -> ModuleType:
    """The compiled module of the tardkd that is installed on one of ``paths``, for the sources of this one.

    Raises:
        ImportError: there is none, or its Python side, ``tardkd/ops``, is not that of these sources: the two would
            misunderstand each other.
    """
    package = PathFinder.find_spec("tardkd", paths)
    folders = list(package.submodule_search_locations or []) if package else []
    spec = PathFinder.find_spec(NAME, folders)
    if spec is None or spec.loader is None:
        raise ImportError(f"there is none in {PACKAGE}, and none is installed")
    for source in sorted((PACKAGE / "ops").glob("*.py")):
        installed = Path(folders[0], "ops", source.name)
        if not installed.exists() or installed.read_bytes() != source.read_bytes():
            raise ImportError(f"there is none in {PACKAGE}, and that in {folders[0]} belongs to another {source.name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    return module


native_module = load_module()
