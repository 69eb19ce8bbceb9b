"""The package itself: what is there without further imports, and that it comes fast."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tardkd


def python(code: str) -> str:
    """The output of a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_packages_are_attributes():
    assert python("import tardkd; print(tardkd.ops.region_distill_loss.__name__)") == "region_distill_loss"
    assert python("import tardkd; print(tardkd.distill.Distiller.__name__)") == "Distiller"
    assert {"ops", "distill", "detectors", "data", "train", "build_info"} <= set(dir(tardkd))


def test_an_unknown_attribute_is_none():
    with pytest.raises(AttributeError, match="module 'tardkd' has no attribute 'opps'"):
        _ = tardkd.opps


def test_to_import_the_package_does_not_import_torch():
    assert python("import sys, tardkd; print('torch' in sys.modules)") == "False"
