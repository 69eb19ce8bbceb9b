"""The command line: ``tardkd train | doctor | eval | plot | inspect | export | demo | info``."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tardkd.files import write_text
from tardkd.train.formats import FORMATS
from tardkd.train.interrupt import Interrupted
from tardkd.train.roles import ROLES

SPLITS = ("train", "val", "test")


class UsageError(ValueError):
    """A command that cannot be carried out as it was given."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for what the user can mend, 130 after Ctrl-C, 143 after SIGTERM.

    The doctor's is 1 where it has found a problem.
    """
    _prepare_output()
    options = _parse(arguments)
    try:
        status = options.run(options) or 0
        sys.stdout.flush()  # here, where a reader who has gone is no error
        return status
    except ModuleNotFoundError as error:
        if options.traceback or (error.name or "tardkd").startswith("tardkd"):
            raise
        return _fail(f'this command needs the package {error.name}: pip install "tardkd[train]"')
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        _forget_output()
        return 0
    except Interrupted as error:
        return _fail(str(error), 128 + error.number)
    except UnicodeEncodeError as error:
        if options.traceback or error.encoding == "utf-8":
            raise
        return _fail(
            f"{error.object!a:.200} cannot be a file's name in the encoding {error.encoding}; set PYTHONUTF8=1"
        )
    except (ValueError, OSError, RuntimeError) as error:
        if _rank() is not None and _lost_another(error):
            return _fail("ended, because another process has")
        # Out of memory and failures inside torch are RuntimeErrors, too; only ours carry a message for the user.
        ours = isinstance(error, (ValueError, OSError)) or type(error).__module__.startswith("tardkd")
        if options.traceback or not ours:
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:  # a print failed
            _forget_output()
            return _fail(f"cannot write to the standard output: {error.strerror}")
        return _fail(str(error))


def train(options: argparse.Namespace) -> None:
    from tardkd.train.build import start_from
    from tardkd.train.config import load_config
    from tardkd.train.logs import describe
    from tardkd.train.loop import train as run
    from tardkd.train.terminal import patient_console

    console = patient_console(quiet=options.quiet)

    def say_numbers(values: dict[str, Any]) -> None:
        shown = [f"{name} {value:.4g}" for name, value in values.items() if value is not None]
        console.print(" ".join(shown), highlight=False, markup=False, soft_wrap=True)

    config = load_config(options.config, options.overrides)
    if options.role:
        config = config.for_role(options.role)
    if options.init_from:
        if options.resume:
            raise UsageError("--init-from starts a new run and --resume goes on with one: give one of the two")
        config = start_from(config, str(_checkpoint(options.init_from)))
    result = run(
        config,
        resume=options.resume,
        overwrite=options.overwrite,
        console=console,
        on_log=say_numbers if options.verbose else None,
    )
    if _rank() or options.quiet:
        return  # of several processes the first one says it
    print(f"{result.folder}: {describe(result.metrics)} after {result.seconds:.0f} s; best AP {result.best_ap:.1f}")


def doctor(options: argparse.Namespace) -> int:
    import json

    from tardkd.doctor import examine

    report = examine(
        options.config, options.overrides, role=options.role, images=options.images, thorough=options.thorough
    )
    if options.json:
        write_text(options.json, json.dumps(report.plain(), indent=2))
    return report.status


def evaluate(options: argparse.Namespace) -> None:
    import json

    from tardkd.train import checkpoint
    from tardkd.train.batches import build_batches
    from tardkd.train.build import build_dataset, check_classes, fit_images, load_student, stored_config
    from tardkd.train.distributed import pick_device
    from tardkd.train.evaluate import evaluate as run
    from tardkd.train.logs import describe

    path = _checkpoint(options.checkpoint)
    state = checkpoint.load_trained(path)
    config = stored_config(state, path, options.overrides)
    dataset = build_dataset(config, options.split)
    check_classes(path, state["classes"], f"data.{options.split}", dataset.class_names)
    model = load_student(state, path).to(pick_device(config.train.device))
    fit_images(dataset, model)
    metrics = run(model, build_batches(config, dataset), dataset)
    print(f"{path} on {options.split}, {len(dataset)} images: {describe(metrics)}")
    for name, value in metrics["per_class"].items():
        print(f"  {name}: {'-' if value is None else format(value, '.1f')}")
    if options.json:
        write_text(options.json, json.dumps(metrics, indent=2))


def plot(options: argparse.Namespace) -> None:
    from tardkd.seeing.curves import plot_curves, unique_names

    runs = unique_names(options.runs)
    print(f"{plot_curves(runs, options.out)}: {', '.join(runs)}")


def inspect(options: argparse.Namespace) -> None:
    from tardkd.seeing.inspect import inspect_run

    summary = inspect_run(
        _checkpoint(options.checkpoint),
        Path(options.out),
        split=options.split,
        count=options.images,
        ids=options.ids,
        overrides=options.overrides,
    )
    print(f"{options.out}: {summary}")


def export(options: argparse.Namespace) -> None:
    from tardkd.train.export import export as run

    print(
        run(
            _checkpoint(options.checkpoint),
            options.out,
            options.format,
            size=options.size and tuple(options.size),
            overwrite=options.overwrite,
        )
    )


def demo(options: argparse.Namespace) -> None:
    from tardkd.demo.demo import run_demo

    run_demo(Path(options.out), seeds=options.seeds, quick=options.quick, overwrite=options.overwrite)


def info(options: argparse.Namespace) -> None:
    import tardkd

    for name, value in tardkd.build_info().items():
        print(f"{name}: {value}")


def _checkpoint(given: str) -> Path:
    """A checkpoint file, or a run's folder, whose last checkpoint is meant."""
    path = Path(given)
    return path / "last.pt" if path.is_dir() else path


def _fail(message: str, status: int = 2) -> int:
    rank = _rank()
    try:
        message.encode(sys.getfilesystemencoding())
    except UnicodeEncodeError as error:
        message += (
            f" (names of files with such letters need a locale with UTF-8, or PYTHONUTF8=1; it is {error.encoding})"
        )
    with contextlib.suppress(OSError):  # nobody may be reading any more
        print(f"tardkd: {message if rank is None else f'process {rank}: {message}'}", file=sys.stderr, flush=True)
    return status


def _prepare_output() -> None:
    """Let what is printed go nowhere where the command was started without an output.

    Escape what the terminal's encoding lacks, such as letters of a class's name where LANG is C.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it is there as long as the process)
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _forget_output() -> None:
    """Let what is still to be written go nowhere, so that the interpreter's last flush stays quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _rank() -> int | None:
    """This process's number among several that torchrun has started."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def _lost_another(error: Exception) -> bool:
    """Whether it is a message of gloo, NCCL or their store that tells of a process which is gone.

    Gloo has one for each thing that a connection can die of, as a plain RuntimeError that names its own source file.
    """
    message = str(error)
    return type(error).__module__.startswith("torch.distributed") or "gloo/" in message or "by peer" in message


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand anywhere among the options, which argparse alone does not allow in subcommands."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    unknown = [word for word in rest if word not in overrides or not hasattr(options, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if overrides:
        options.overrides = [*options.overrides, *overrides]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tardkd", description="Distil object detectors.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(run, summary: str) -> argparse.ArgumentParser:
        name = {evaluate: "eval"}.get(run, run.__name__)
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run)
        return sub

    _train_options(command(train, "train a detector, alone or with a teacher"))
    _doctor_options(command(doctor, "check everything that a training depends on, before it starts"))
    _evaluate_options(command(evaluate, "average precision of a trained student"))
    _plot_options(command(plot, "curves of runs against each other, finished or not"))
    _inspect_options(command(inspect, "pictures of what the teacher taught a distilled student, region by region"))
    _export_options(command(export, "write the student for others to run: as a state dict, TorchScript or ONNX"))
    _demo_options(command(demo, "teacher, student alone and distilled student on the built-in scenes"))
    command(info, "version and what the native module was built with")
    return parser


def _version() -> str:
    from tardkd.info import __version__

    return __version__


def _train_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", required=True, metavar="FILE", help="a recipe in YAML")
    sub.add_argument("--role", choices=ROLES, help="which part of the recipe to train; adds its name to output")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.lr=0.01")
    start = sub.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on exactly from the last checkpoint in output")
    start.add_argument("--overwrite", action="store_true", help="remove an earlier run from output and start again")
    sub.add_argument(
        "--init-from",
        metavar="PATH",
        help="start a new run from these weights of the student: a run's "
        "folder, a checkpoint, a state dict or a .safetensors file",
    )
    much = sub.add_mutually_exclusive_group()
    much.add_argument("-q", "--quiet", action="store_true", help="say nothing but warnings and errors")
    much.add_argument("-v", "--verbose", action="store_true", help="say all numbers of every step, a line each")


def _doctor_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", required=True, metavar="FILE", help="a recipe in YAML")
    sub.add_argument("--role", choices=ROLES, help="which part of the recipe is to be trained")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.root=elsewhere")
    sub.add_argument(
        "--images",
        type=_positive,
        default=50,
        metavar="N",
        help="images to open and to try the models on (default %(default)s)",
    )
    sub.add_argument("--thorough", action="store_true", help="open all images")
    sub.add_argument("--json", metavar="FILE", help="write the findings there, too")


def _evaluate_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", help="a checkpoint, or a run's folder for its last one")
    sub.add_argument("--split", choices=SPLITS, default="val")
    sub.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.root=elsewhere")


def _plot_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("runs", nargs="+", metavar="run", help="a run's folder")
    sub.add_argument("--out", required=True, metavar="FILE", help="a picture: .png, .svg or .pdf")


def _inspect_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", help="a distilled run's folder for its last checkpoint, or a checkpoint")
    sub.add_argument("--out", required=True, metavar="DIR", help="for the pictures and regions.csv")
    sub.add_argument("--split", choices=SPLITS, default="val")
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--images", type=_positive, default=8, metavar="N", help="spread over the split (default 8)")
    which.add_argument("--ids", type=int, nargs="+", metavar="ID", help="these images")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="such as teacher.weights=elsewhere.pt")


def _export_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("checkpoint", help="a checkpoint, or a run's folder for its last one")
    sub.add_argument("--out", required=True, metavar="FILE")
    sub.add_argument("--format", choices=FORMATS, help="default: by the suffix .pt, .pth, .safetensors, .ts or .onnx")
    sub.add_argument("--size", nargs=2, type=_positive, metavar=("HEIGHT", "WIDTH"), help="of an ONNX file's images")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _demo_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", default="runs/demo", metavar="DIR", help="default: %(default)s")
    sub.add_argument("--seeds", type=_positive, default=1, metavar="N", help="repeat with N seeds (default 1)")
    sub.add_argument("--quick", action="store_true", help="tiny budgets: everything runs, nothing is learned")
    sub.add_argument("--overwrite", action="store_true", help="remove an earlier demo from the folder")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
