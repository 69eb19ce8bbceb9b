"""No module imports from a layer above its own, and no two modules import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "tardkd"

# From the bottom to the top. A module may import from its own package and from the layers below; of two packages in
# one layer neither may import the other.
LAYERS = (
    ("_native", "device", "files", "weights"),
    ("ops", "data"),
    ("info", "tardkd"),  # the face of the package, which says what the ops were built with
    ("detectors",),
    ("distill",),
    ("train",),
    ("doctor", "seeing"),
    ("demo",),
    ("cli",),
    ("__main__",),
)
LEVELS = {package: level for level, packages in enumerate(LAYERS) for package in packages}


def modules(root: Path) -> dict[str, Path]:
    """Every module by its dotted name, the root's included."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: Iterable[str], *, inside_functions: bool = True) -> Iterator[str]:
    """The modules of this project that a module imports from, those in functions included or not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if node in later and not inside_functions:
            continue
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target.split(".")[0] == "tardkd":
                is_module = target in known or target == "tardkd._native"
                yield target if is_module else target.rpartition(".")[0]


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "tardkd"


def upward(root: Path) -> list[str]:
    """Every import from a layer above, or from another package of the same layer."""
    known = modules(root)
    arrows = []
    for name, path in known.items():
        for target in imports(name, path, known):
            own, other = package_of(name), package_of(target)
            if own != other and LEVELS[other] >= LEVELS[own] and {own, other} != {"info", "tardkd"}:
                arrows.append(f"{name} -> {target}")
    return arrows


def test_every_package_has_its_layer():
    assert {package_of(name) for name in modules(ROOT)} <= LEVELS.keys()


def test_nothing_imports_upwards():
    assert upward(ROOT) == []


def test_no_two_modules_need_each_other_to_be_imported():
    known = modules(ROOT)
    graph = {name: set(imports(name, path, known, inside_functions=False)) - {name} for name, path in known.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    "path, line, arrow",
    [
        ("distill/a.py", "from tardkd.train import checkpoint", "tardkd.distill.a -> tardkd.train"),
        ("distill/a.py", "import tardkd.cli", "tardkd.distill.a -> tardkd.cli"),
        ("distill/a.py", "def f():\n    from ..doctor.b import x", "tardkd.distill.a -> tardkd.doctor.b"),
        ("doctor/b.py", "from tardkd.seeing import plots", "tardkd.doctor.b -> tardkd.seeing"),
        ("device.py", "from .ops import maps", "tardkd.device -> tardkd.ops"),
        ("train/c.py", "from tardkd import build_info\nfrom . import x\nfrom ..distill.a import y\nimport torch", None),
    ],
)
def test_an_upward_import_is_found(tmp_path, path, line, arrow):
    for name in ("cli.py", "device.py", "distill/a.py", "doctor/b.py", "train/c.py"):
        file = tmp_path / "tardkd" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.touch()
    (tmp_path / "tardkd" / path).write_text(line)
    assert upward(tmp_path / "tardkd") == ([arrow] if arrow else [])
