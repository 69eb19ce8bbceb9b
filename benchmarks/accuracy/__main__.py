"""The command: ``python -m benchmarks.accuracy run main``, ``test main`` and ``report``."""

from __future__ import annotations

import argparse
import os
from fnmatch import fnmatch
from pathlib import Path

import torch

from .queue import Places, evaluate_test, work_off
from .report import write_report
from .suites import SUITES

RESULTS = Path(__file__).parents[1] / "results" / "accuracy"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "train what of a suite is not finished; several processes may do so at once"),
        ("test", "look at the test split, once all choices are made"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("suite", choices=SUITES)
        command.add_argument("--only", default="*", help="a pattern of names such as bccd/pretrained/pkd/*")
        command.add_argument("--data", type=Path, required=True, help="folder of the data sets' folders")
        command.add_argument("--weights", type=Path, required=True, help="folder of the ImageNet classifiers' files")
        command.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="for images and weights")
        command.add_argument("--results", type=Path, default=RESULTS)
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--list", action="store_true", help="say what is wanted and what of it is finished")
    command = commands.add_parser("report", help="write report.md and its plots from the results that there are")
    command.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.command == "report":
        write_report(arguments.results)
        return
    os.nice(0)
    torch.set_num_threads(arguments.threads)
    places = Places(arguments.data, arguments.weights, arguments.work, arguments.results)
    runs = [run for run in SUITES[arguments.suite] if fnmatch(run.name, arguments.only)]
    if arguments.list:
        for run in runs:
            print("finished" if places.result(run).exists() else "wanted  ", run.name)
    elif arguments.command == "run":
        work_off(runs, places)
    else:
        evaluate_test(runs, places)


if __name__ == "__main__":
    main()
