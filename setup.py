"""Builds the native module: CMake, driven with Ninja. CMakeLists.txt is the one description of that build.

Environment: ``TARDKD_BUILD_CUDA`` = auto (default: if nvcc is found) | 1 | 0, ``FORCE_CUDA=1`` as 1; the
architectures from ``TARDKD_CUDA_ARCH_LIST``, else ``TORCH_CUDA_ARCH_LIST``, else ``CUDAARCHS``; ``MAX_JOBS``.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        source = Path(__file__).parent.resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(
            [
                "cmake",
                "--fresh",  # a cache from an earlier isolated build names tools that are gone; objects are kept
                "-G",
                "Ninja",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
                "-DCMAKE_BUILD_TYPE=Release",
                *cuda_options(),
                str(source),
            ],
            cwd=build,
            check=True,
        )
        subprocess.run(["cmake", "--build", ".", "--target", "_native", "-j", jobs], cwd=build, check=True)


def cuda_options() -> list[str]:
    wish = "1" if os.environ.get("FORCE_CUDA") == "1" else os.environ.get("TARDKD_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"TARDKD_BUILD_CUDA must be auto, 0 or 1, got {wish!r}")
    options = [f"-DTARDKD_BUILD_CUDA={wish}"]
    for name in ("TARDKD_CUDA_ARCH_LIST", "TORCH_CUDA_ARCH_LIST", "CUDAARCHS"):
        if os.environ.get(name):
            return [*options, f"-DTARDKD_CUDA_ARCH_LIST={os.environ[name]}"]
    return options


setup(ext_modules=[Extension("tardkd._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
