"""Runs tests on small inputs under the four tools of compute-sanitizer, all at once, and sums up what they found.

    python tests/gpu/sanitize.py [--limit 300] [--summary sanitizer.json]

Needs a GPU and an installed tardkd with CUDA kernels. Fails if a tool found something, did not get through, or if the
tests themselves failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ("-m", "gpu", "-k", "float32 or bfloat16 or no_regions", "tests/gpu/test_small.py")
OURS = ("--kernel-name", "kns=tardkd")
# initcheck must see what every kernel writes; the others need not look at those of torch.
TOOLS = {
    "memcheck": (*OURS, "--report-api-errors", "no"),
    "racecheck": OURS,
    "initcheck": (),
    "synccheck": OURS,
}
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (?P<errors>\d+) error|RACECHECK SUMMARY: (?P<hazards>\d+) hazard)")


def find_sanitizer() -> str:
    nvcc = shutil.which("nvcc")
    folders = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    if nvcc:
        folders.append(str(Path(nvcc).resolve().parent))
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if tool is None:
        raise SystemExit("compute-sanitizer was not found: it comes with the CUDA toolkit, put its folder on PATH")
    return tool


def sanitize(sanitizer: str, tool: str, limit: float) -> dict[str, object]:
    """What ``tool`` found, and all it printed."""
    command = [sanitizer, "--tool", tool, "--print-limit", "20", "--target-processes", "all", *TOOLS[tool]]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    environment = dict(
        os.environ,
        PYTHONSAFEPATH="1",  # the installed package, not the source tree
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # every tensor an allocation of its own, with an end to run over
    )
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    timed_out = False
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        timed_out = True
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return judge(tool, output, process.returncode, timed_out) | {
        "seconds": round(time.monotonic() - start),
        "output": output,
    }


def judge(tool: str, output: str, code: int, timed_out: bool) -> dict[str, object]:
    summaries = [int(found["errors"] or found["hazards"] or 0) for found in SUMMARY.finditer(output)]
    tests = re.search(r"^\d+ .*\bin [\d.]+s.*$", output, re.MULTILINE)
    if timed_out:
        result = "timed out"
    elif not summaries:
        result = "did not run"
    elif sum(summaries):
        result = "found errors"
    elif code or not tests or "passed" not in tests[0]:
        result = "tests failed"
    else:
        result = "passed"
    return {"tool": tool, "result": result, "errors": sum(summaries), "tests": tests[0] if tests else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--limit", type=float, default=300, help="seconds for each tool")
    parser.add_argument("--summary", type=Path, help="also write the results to this file, as JSON")
    arguments = parser.parse_args()

    sanitizer = find_sanitizer()
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        results = list(pool.map(lambda tool: sanitize(sanitizer, tool, arguments.limit), TOOLS))
    for result in results:
        print(f"===== {result['tool']}\n{result.pop('output')}")
    for result in results:
        print("{tool}: {result}, {errors} errors, {seconds} s; tests: {tests}".format(**result))
    if arguments.summary:
        arguments.summary.write_text(json.dumps(results, indent=1))
    if any(result["result"] != "passed" for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
