"""Builds and imports the module that runs the CUDA kernels on the CPU (csrc/cuda_on_cpu).

The build is incremental: whatever has changed since the last run is compiled again. ``TARDKD_CUDA_ON_CPU_BUILD``
names another build folder than ``build/cuda-on-cpu``, such as one configured with ``-DTARDKD_SANITIZE=ON``; what
was configured there stays as it is. ``MAX_JOBS`` bounds the compilers that run at once.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def load() -> ModuleType:
    folder = Path(os.environ.get("TARDKD_CUDA_ON_CPU_BUILD") or ROOT / "build" / "cuda-on-cpu").resolve()
    return build("cuda_on_cpu", folder)


def build(name: str, folder: Path) -> ModuleType:
    """The module ``_name``, which the option TARDKD_BUILD_NAME of the build is for."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other processes of a parallel test run find everything built
        compile_in(folder, name)
        spec = importlib.util.spec_from_file_location(
            f"_{name}", folder / f"_{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def compile_in(folder: Path, name: str) -> None:
    options = {
        "Python_EXECUTABLE": sys.executable,
        f"TARDKD_BUILD_{name.upper()}": "ON",
        "TARDKD_BUILD_CUDA": "0",
        "TARDKD_BUILD_PYTHON": "OFF",
    }
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    _run("cmake", "-G", "Ninja", *(f"-D{key}={value}" for key, value in options.items()), "-S", ROOT, "-B", folder)
    _run("cmake", "--build", folder, "--target", f"_{name}", "-j", jobs)


def _run(*command: str | Path) -> None:
    # The tools beside this interpreter come first; a sanitizer preloaded into it is not meant for the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    except FileNotFoundError:
        raise RuntimeError("building the CUDA kernels for the CPU takes cmake: pip install 'tardkd[test]'") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}:\n{done.stdout}")
