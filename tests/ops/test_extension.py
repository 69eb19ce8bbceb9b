"""Where the compiled module is taken from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tardkd.ops import extension


@pytest.fixture
def installed(tmp_path):
    """A folder with a copy of the package and of the compiled module in use, as if it were installed there."""
    package = tmp_path / "installed" / "tardkd"
    copy_sources(package)
    shutil.copy(extension.native_module.__file__, package)
    return package


def copy_sources(package: Path) -> None:
    shutil.copytree(extension.PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))


def test_a_checkout_takes_the_module_of_the_installed_package(installed, tmp_path):
    copy_sources(tmp_path / "checkout" / "tardkd")
    program = (
        "import tardkd, tardkd.ops.extension as extension\n"
        "print(tardkd.__file__, extension.native_module.__file__, 'cpu' in tardkd.build_info()['kernel_devices'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "checkout",
        env={**os.environ, "PYTHONPATH": str(installed.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    package, module, kernels = done.stdout.split()
    assert Path(package).parent == tmp_path / "checkout" / "tardkd"
    assert Path(module).parent == installed
    assert kernels == "True"


@pytest.mark.parametrize("change", [lambda file: file.write_text("another"), Path.unlink], ids=["changed", "absent"])
def test_a_module_of_other_sources_is_refused(installed, change):
    change(installed / "ops" / "checks.py")
    with pytest.raises(ImportError, match=r"that in .*installed.tardkd belongs to another checks\.py"):
        extension.installed_module([str(installed.parent)])


@pytest.mark.parametrize("package", [True, False], ids=["not compiled", "not installed"])
def test_nothing_is_installed(tmp_path, package):
    if package:
        copy_sources(tmp_path / "tardkd")
    with pytest.raises(ImportError, match="and none is installed"):
        extension.installed_module([str(tmp_path)])
