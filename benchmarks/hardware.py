"""Everything that takes a GPU, in one command: build, benchmarks, tests, sanitizers, and a record of it all.

    python3 benchmarks/hardware.py OUTPUT [--wheels FOLDER]

Wants Python with torch, torchvision, pytest, hypothesis, pytest-benchmark, CMake, ninja and pybind11 installed, and
nvcc on PATH; downloads nothing. What is missing of the packages is taken from FOLDER, as ``pip download -d FOLDER``
fills it. Ends within nine minutes: a step that takes too long is stopped, the others still run, and what matters most
comes first. OUTPUT gets record.json, record.md, log.txt, benchmarks.json, predicted.md, which has what was predicted
beside what was measured, and, where matplotlib is, report.md with plots; the records are brought up to date after each
step. Fails unless every step passed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
TOTAL_SECONDS = 520
BENCHMARK_SECONDS = 200
PACKAGES = ("pytest", "hypothesis", "pytest-benchmark", "cmake", "ninja", "pybind11")
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")

DEVICE = """
import json, torch
properties = torch.cuda.get_device_properties(0)
print(json.dumps({
    "device": properties.name,
    "devices": torch.cuda.device_count(),
    "capability": f"{properties.major}.{properties.minor}",
    "memory_gib": round(properties.total_memory / 2**30, 1),
    "torch": torch.__version__,
    "torch_cuda": torch.version.cuda,
}))
"""
BUILD = "import json, tardkd; print(json.dumps(tardkd.build_info()))"


# --- steps ---------------------------------------------------------------------------------------------------------


class Runner:
    """Runs commands one after the other within the time that is left, and keeps what they print."""

    def __init__(self, log: Path, save: Callable[[list[dict]], None]) -> None:
        self.log = log
        self.save = save  # called with all steps so far
        self.deadline = time.monotonic() + TOTAL_SECONDS
        self.steps: list[dict] = []

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def step(
        self, name: str, command: tuple[str, ...], limit: float, report: Path | None = None, **variables: str
    ) -> dict:
        """``report``: the JUnit file that the command, a pytest, writes; ``variables``: of the environment."""
        start = time.monotonic()
        limit = min(limit, self.left())
        if limit < 5:
            status = "not run: no time was left"
        else:
            print(f"== {name}: at most {limit:.0f} s", flush=True)
            status = self._run(name, command, limit, variables)
        seconds = round(time.monotonic() - start, 1)
        result = {"step": name, "status": status, "seconds": seconds, "command": " ".join(command)}
        if report is not None and report.exists():
            result |= read_report(report)
        self.steps.append(result)
        self.save(self.steps)
        print(f"   {status}, {seconds} s", *(f"{key}: {result[key]}" for key in COUNTS if key in result), flush=True)
        return result

    def _run(self, name: str, command: tuple[str, ...], limit: float, variables: dict[str, str]) -> str:
        # The installed package is meant, not the source tree.
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **variables}
        with self.log.open("a") as log:
            log.write(f"\n\n===== {name}: {' '.join(command)}\n\n")
            log.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                return "passed" if process.wait(limit) == 0 else f"failed with exit status {process.returncode}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return "stopped: took too long"


COUNTS = ("passed", "failed", "skipped")


def read_report(path: Path) -> dict:
    """How the tests of a JUnit file ended; which failed, and why some were skipped."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    reasons = Counter(skip.get("message", "") for case in cases if (skip := case.find("skipped")) is not None)
    return {
        "passed": len(cases) - len(failed) - sum(reasons.values()),
        "failed": len(failed),
        "skipped": sum(reasons.values()),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in failed[:100]],
        "skip_reasons": dict(reasons),
    }


# --- what it ran on ------------------------------------------------------------------------------------------------


def output_of(*command: str, cwd: Path = ROOT) -> str:
    """ "" if it cannot be had."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def describe_machine() -> dict:
    device = output_of(sys.executable, "-c", DEVICE)
    if not device:
        raise SystemExit("no CUDA device that torch could use")
    release = re.search(r"V([\d.]+)", output_of("nvcc", "--version"))
    return {
        **json.loads(device),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        "nvcc": release[1] if release else "",
        "python": platform.python_version(),
        "torchvision": output_of(sys.executable, "-c", "import torchvision; print(torchvision.__version__)"),
        "commit": output_of("git", "rev-parse", "HEAD"),
        "changed_files": output_of("git", "status", "--short").splitlines(),
    }


# --- record --------------------------------------------------------------------------------------------------------


def as_markdown(record: dict) -> str:
    lines = [f"# {record['device']}", ""]
    plain = {key: value for key, value in record.items() if key not in ("steps", "sanitizer")}
    lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in plain.items()]
    lines += ["", "| step | result | seconds | passed | failed | skipped |", "|---|---|---|---|---|---|"]
    for step in record["steps"]:
        counts = " | ".join(str(step.get(key, "")) for key in COUNTS)
        lines.append(f"| {step['step']} | {step['status']} | {step['seconds']} | {counts} |")
    if record["sanitizer"]:
        lines += ["", "| compute-sanitizer | result | errors | seconds | tests |", "|---|---|---|---|---|"]
        form = "| {tool} | {result} | {errors} | {seconds} | {tests} |"
        lines += [form.format(**tool) for tool in record["sanitizer"]]
    for title, key in (("Failed", "failures"), ("Skipped because of", "skip_reasons")):
        found = [f"- {step['step']}: {entry}" for step in record["steps"] for entry in step.get(key, ())]
        if found:
            lines += ["", f"{title}:", "", *found]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--wheels", type=Path, help="folder with the packages that are not installed")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    (output / "log.txt").write_text("")
    record = describe_machine()
    print(json.dumps(record, indent=1), flush=True)

    def save(steps: list[dict]) -> None:
        record["steps"] = steps
        record["sanitizer"] = json.loads(summary.read_text()) if summary.exists() else []
        (output / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        (output / "record.md").write_text(as_markdown(record))

    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder)
        summary = reports / "sanitizer.json"
        runner = Runner(output / "log.txt", save)

        def tests(name: str, limit: float, *arguments: str, **variables: str) -> None:
            report = reports / f"{name}.xml"
            runner.step(name, (*PYTEST, f"--junitxml={report}", *arguments), limit, report, **variables)

        if arguments.wheels is not None:
            source = ("--no-index", "--find-links", str(arguments.wheels.resolve()))
            runner.step("wheels", (sys.executable, "-m", "pip", "install", *source, *PACKAGES), 60)
        architecture = os.environ.get("TARDKD_CUDA_ARCH_LIST", record["capability"])
        install = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", ".")
        installed = runner.step("install", install, 180, TARDKD_BUILD_CUDA="1", TARDKD_CUDA_ARCH_LIST=architecture)
        record |= json.loads(output_of(sys.executable, "-c", BUILD, cwd=reports) or "{}")
        if installed["status"] == "passed":
            limit = min(BENCHMARK_SECONDS, runner.left() - 15)  # stops by itself: its file is written at the end
            results = output / "benchmarks.json"
            tests("benchmarks", limit, "-q", "benchmarks", f"--budget={limit - 45:.0f}", f"--benchmark-json={results}")
            if results.exists() and importlib.util.find_spec("matplotlib") is not None:
                runner.step("report", (sys.executable, "benchmarks/report.py", str(results), "--out", str(output)), 30)
            if results.exists():
                beside = output_of(sys.executable, "benchmarks/predict.py", "--measured", str(results))
                (output / "predicted.md").write_text(f"{beside}\n")
                print(beside, flush=True)
            parallel = importlib.util.find_spec("xdist") is not None
            # Each file by one process: the tensors of two large tests at once may not fit.
            files = ("-n", "4", "--dist", "loadfile") if parallel else ()
            tests("gpu", 120, "-v", "-m", "gpu", *files, "tests/gpu")
            workers = ("-n", "6") if parallel else ()
            tests("ops", 100, "-q", "-m", "gpu", *workers, "tests/ops", OMP_NUM_THREADS="2")
            limit = min(120, runner.left())  # its own limit comes first: only it can stop what it has started
            sanitize = (sys.executable, "tests/gpu/sanitize.py", "--summary", str(summary))
            runner.step("sanitizer", (*sanitize, "--limit", f"{limit - 10:.0f}"), limit)
    print(as_markdown(record))
    if any(step["status"] != "passed" for step in runner.steps):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
