"""Whole commands in circumstances as bad as they come: other data, no permission, no reader, another at the same time.

A command runs in a process that is forked, as to import torch each time would take longer than the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from PIL import Image

import tardkd.doctor
import tardkd.seeing.curves
import tardkd.seeing.inspect
import tardkd.train.export
import tardkd.train.loop  # noqa: F401 (all of these so that no command has to load them)
from tardkd import cli
from tardkd.data.coco import check_annotations
from tardkd.data.scenes import write_scenes
from tardkd.train import checkpoint
from tardkd.train.tables import read_table
from tests.train.recipe import tree

from .cases import Finding, Target, slowness
from .files import damaged

PATIENCE = 30.0  # seconds after which a command, which needs one or two, is taken to hang on an idle machine
EPOCHS, EPOCH = 3, 3  # of the run, and steps in each
STOP = 4  # the step after which the run was told to end
RESUME = ("train", "--config", "recipe.yaml", "--role", "distilled", "--resume")
COMMANDS = (
    RESUME,
    (*RESUME[:-1], "--overwrite"),
    RESUME[:-1],
    (*RESUME[:-1], "output=new", "teacher.weights=out/teacher/last.pt"),
    ("doctor", *RESUME[1:-1], "--images", "2", "--json", "doctor.json"),
    ("eval", "out/distilled", "--json", "metrics.json"),
    ("plot", "out/distilled", "out/teacher", "--out", "curves.png"),
    ("inspect", "out/distilled", "--out", "pictures"),
    ("export", "out/distilled", "--out", "student.pt"),
    ("export", "out/distilled", "--out", "student.pt", "--overwrite"),
    ("info",),
)


class Ended(NamedTuple):
    """What a command left when it ended."""

    status: int | None  # its exit status, or minus the signal it died of; None: it did not end
    errors: str  # what it wrote to the standard error


# --- running a command ------------------------------------------------------------------------------------------------


def start(arguments: Sequence[str], folder: Path, errors: Path, prepare: Callable[[], Any] | None = None) -> int:
    """The number of a process that runs the command in `folder`, after `prepare`, and says nothing but errors."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        if prepare is not None:
            prepare()
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            setattr(sys, name, os.fdopen(descriptor, "w") if is_open(descriptor) else None)  # as the interpreter does
        warnings.simplefilter("ignore")
        multiprocessing.current_process()._config["daemon"] = False  # it may have workers
        # Else its workers would start as the process that fuzzes was started: by importing torch, which takes seconds.
        multiprocessing.set_start_method(None, force=True)
        status = cli.main(list(arguments))
        if status == 0:  # the interpreter flushes, too, and says so where it cannot
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def ended(process: int, errors: Path, patience: float = PATIENCE) -> Ended:
    """Wait for it; where that takes too long, end it."""
    until = time.monotonic() + patience * slowness()
    status = None
    while status is None and time.monotonic() < until:
        found, code = os.waitpid(process, os.WNOHANG)
        if found:
            status = os.waitstatus_to_exitcode(code)
        else:
            time.sleep(0.005)
    if status is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return Ended(status, errors.read_text(errors="replace") if errors.exists() else "")


def judge(end: Ended, words: Sequence[str], what: object) -> str:
    """What the end counts as. A refusal is one message, with one of the `words` in it."""
    if end.status is None:
        raise Finding("hang", f"{what}: {end.errors[-300:]}")
    if end.status < 0:
        raise Finding("crash", f"{what}: signal {-end.status}: {end.errors[-300:]}")
    if "Traceback" in end.errors or end.status not in (0, 1, 2):  # 1: the doctor found a problem
        raise Finding("traceback", f"{what}: status {end.status}: {end.errors[-800:]}")
    if end.status != 2:
        return "done"
    message = end.errors.strip().splitlines()[-1:]
    if not message or not any(word in end.errors for word in words):
        raise Finding("traceback", f"{what}: a refusal that does not name what was wrong: {end.errors[-300:]}")
    return "refused"


def become_ordinary() -> None:
    """Give up what root may do beyond the owner of a file, who may be kept out by its permissions."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # the version of the call, this process
    nothing = (ctypes.c_uint32 * 6)()  # the effective, permitted and inheritable capabilities, in two halves
    if libc.capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


# --- the run that the commands are about ------------------------------------------------------------------------------


@functools.cache
def stopped_run() -> Path:
    """A folder with data, a recipe, a teacher and a distilled run that was told to end within an epoch."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    write_scenes(folder / "data", splits={"train": 6, "val": 2}, image_size=64, seed=0)
    split = {name: {"images": "images", "annotations": f"annotations/{name}.json"} for name in ("train", "val")}
    description: dict[str, Any] = {**tree(Path("out")), "data": {"kind": "coco", "root": "data", **split}}
    description["train"] |= {"epochs": EPOCHS, "save_every": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(description))
    for name in ("student.pt", "curves.png"):
        (folder / name).write_text("another's")

    def stop_at(step: int) -> None:
        from tardkd.train import logs

        original = logs.RunLog.step

        def record(self: Any, epoch: int, number: int, *args: Any, **kwargs: Any) -> None:
            original(self, epoch, number, *args, **kwargs)
            if number == step:
                signal.raise_signal(signal.SIGTERM)

        logs.RunLog.step = record  # type: ignore[method-assign]

    errors = folder / "errors"
    for role, step, status in (("teacher", 0, 0), ("distilled", STOP, 143)):
        command = (*RESUME[:3], "--role", role)
        end = ended(start(command, folder, errors, lambda step=step: stop_at(step)), errors, 60)
        if end.status != status:
            raise RuntimeError(f"the run to begin with ended with {end}")
    errors.unlink()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_run(folder: Path, what: object) -> int:
    """Nothing of a run is lost: its checkpoint can be read, and its log has every step once. Returns the last step."""
    step = checkpoint.load(folder / "last.pt")["step"]
    header, rows = read_table(folder / "train.csv")
    steps = [int(row[header.index("step")]) for row in rows]
    if step < STOP or steps[:step] != list(range(1, step + 1)):
        raise Finding("wrong result", f"{what}: the checkpoint is of step {step}, the log has the steps {steps}")
    return step


# --- cases ------------------------------------------------------------------------------------------------------------


def changed_data(rng: random.Random) -> Iterator[str]:
    """Data that changed between a run's end and its going on."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        shutil.copytree(stopped_run(), folder)
        before, out = contents(folder / "data"), contents(folder / "out")
        what = change(rng, folder / "data")
        errors = Path(place) / "errors"
        extra = rng.choice([(), (), ("train.workers=1",)])
        end = ended(start((*RESUME, *extra), folder, errors), errors)
        what = " ".join([what, *extra])
        outcome = judge(end, ("data", "image"), what)
        step = check_run(folder / "out/distilled", what)
        if outcome == "refused":
            after = contents(folder / "out")
            if step == STOP and after["distilled/last.pt"] != out["distilled/last.pt"]:
                raise Finding("wrong result", f"{what}: refused, but the checkpoint is another one")
        elif annotations(before) != annotations(contents(folder / "data")):
            raise Finding("wrong result", f"{what}: the run went on with other annotations")
        yield outcome


def annotations(files: dict[str, bytes]) -> list[Any]:
    """Those of both splits, with the images by their numbers, in which order they are read."""
    found = [check_annotations(json.loads(files[f"annotations/{name}.json"]), name) for name in ("train", "val")]
    return [{**content, "images": sorted(content["images"], key=lambda image: image["id"])} for content in found]


def change(rng: random.Random, data: Path) -> str:
    """Change something; returns what."""
    split = rng.choice(["train", "train", "val"])
    path = data / f"annotations/{split}.json"
    content = json.loads(path.read_text())
    image = data / "images" / rng.choice(content["images"])["file_name"]
    kind = rng.choice(
        [
            "damage annotations", "edit annotations", "remove annotations", "other split", "remove images",
            "damage image", "remove image", "resize image", "repaint image", "folder for image", "loop for image",
            "pipe for image",
        ]
    )  # fmt: skip
    if kind == "damage annotations":
        path.write_bytes(damaged(rng, path.read_bytes()))
    elif kind == "edit annotations":
        edit(rng, content)
        path.write_text(json.dumps(content))
    elif kind == "damage image":
        image.write_bytes(damaged(rng, image.read_bytes()))
    elif kind == "resize image":
        Image.new("RGB", (rng.randrange(1, 100), rng.randrange(1, 100))).save(image)
    elif kind == "repaint image":
        Image.new(rng.choice(["RGB", "L", "P", "1", "I;16"]), (64, 64)).save(image)
    elif kind == "remove annotations":
        path.unlink()
    elif kind == "remove images":
        shutil.rmtree(data / "images")
    elif kind == "other split":
        path.write_bytes((data / "annotations" / rng.choice(["train.json", "val.json"])).read_bytes())
    else:
        image.unlink()
        if kind == "folder for image":
            image.mkdir()
        elif kind == "loop for image":
            image.symlink_to(image.name)
        elif kind == "pipe for image":
            os.mkfifo(image)
    return f"{kind} ({split})"


def edit(rng: random.Random, content: dict[str, Any]) -> None:
    """Annotations as a person edits them: each by itself is in order."""
    kind, annotation = rng.randrange(6), rng.choice(content["annotations"])
    if kind == 0:
        annotation["bbox"][rng.randrange(4)] += rng.choice([-1, 0.5, 3])
    elif kind == 1:
        content["annotations"].remove(annotation)
    elif kind == 2:
        annotation["category_id"] = rng.choice(content["categories"])["id"]
    elif kind == 3:
        rng.choice(content["categories"])["name"] = "renamed"
    elif kind == 4:
        image = rng.choice(content["images"])
        content["images"].remove(image)
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] != image["id"]]
    else:
        rng.shuffle(content["images"])


def no_permission(rng: random.Random) -> Iterator[str]:
    """Any command where one file or folder may not be read, written or looked into."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        shutil.copytree(stopped_run(), folder)
        command = rng.choice(COMMANDS)
        path = rng.choice([folder, *sorted(folder.rglob("*"))])
        mode, mode_before = rng.choice([0o000, 0o400, 0o500, 0o200, 0o300]), path.stat().st_mode
        before = contents(folder / "out")
        path.chmod(mode)
        what = (*command, f"where {path.relative_to(place)} has mode {mode:03o}")
        errors = Path(place) / "errors"
        try:
            end = ended(start(command, folder, errors, become_ordinary), errors)
        finally:
            with contextlib.suppress(FileNotFoundError):  # --overwrite has removed it
                path.chmod(mode_before)
        words = [path.name, str(path.relative_to(folder)), "Permission denied", "in use", "exists", "is there already"]
        outcome = judge(end, words, what)
        if outcome == "refused":
            after = contents(folder / "out")
            lost = [name for name in before if name not in after]
            if lost and "--overwrite" not in command:
                raise Finding("wrong result", f"{what}: refused, but {', '.join(lost)} are lost: {end.errors}")
        if "--overwrite" not in command:
            check_run(folder / "out/distilled", what)
        yield outcome


def no_room(rng: random.Random) -> Iterator[str]:
    """Any command that may make no file longer than so many bytes, as if the disk were full there."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        shutil.copytree(stopped_run(), folder)
        command = rng.choice(COMMANDS)
        size = rng.choice([100, rng.randrange(100, 3000), rng.randrange(100, 200_000)])  # torch shares some bytes
        errors = Path(place) / "errors"

        def prepare() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            os.dup2(message[1], 2)  # what it says is in no file

        message = os.pipe()
        end = ended(start(command, folder, errors, prepare), errors)
        os.close(message[1])
        with open(message[0], errors="replace") as file:
            end = end._replace(errors=file.read())
        what = (*command, f"where no file may be longer than {size} bytes")
        yield judge(end, ("cannot write", "in use", "exists", "is there already", "File too large: "), what)
        if "--overwrite" not in command:
            check_run(folder / "out/distilled", what)


def no_reader(rng: random.Random) -> Iterator[str]:
    """Any command whose output is closed, goes into a full disk, or to one who reads a little and leaves."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        shutil.copytree(stopped_run(), folder)
        command = rng.choice(COMMANDS)
        kinds = [rng.choice(["closed", "full", "left", "kept"]) for _ in range(2)]
        pipe: list[int] = []

        def prepare() -> None:
            for descriptor, kind in zip((1, 2), kinds, strict=True):
                if kind == "closed":
                    os.close(descriptor)
                elif kind == "full":
                    os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)
                elif kind == "left":
                    os.dup2(pipe[1], descriptor)
            for end in pipe:
                os.close(end)

        pipe += os.pipe()
        errors = Path(place) / "errors"
        process = start(command, folder, errors, prepare)
        os.close(pipe[1])
        if rng.random() < 0.5:
            os.read(pipe[0], rng.randrange(1, 200))
        os.close(pipe[0])
        end = ended(process, errors)
        what = (*command, f"with output {kinds[0]} and errors {kinds[1]}")
        if end.status == 2 and kinds[1] != "kept":
            end = Ended(0, end.errors)  # its message is not to be seen
        outcome = judge(end, ("in use", "exists", "is there already", "No space left", "output"), what)
        if "--overwrite" not in command:
            step = check_run(folder / "out/distilled", what)
            if command == RESUME and step != EPOCHS * EPOCH:
                raise Finding("wrong result", f"{what}: it ended after step {step}: {end}")
        yield outcome


def two_at_once(rng: random.Random) -> Iterator[str]:
    """Two commands on one run at the same time."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        shutil.copytree(stopped_run(), folder)
        commands = [rng.choice([RESUME, *COMMANDS]) for _ in range(2)]
        errors = [Path(place) / f"errors{number}" for number in range(2)]
        processes = []
        for command, file in zip(commands, errors, strict=True):
            processes.append(start(command, folder, file))
            time.sleep(rng.choice([0, 0, rng.random() / 2]))
        ends = [ended(*one) for one in zip(processes, errors, strict=True)]
        words = ("writes into", "in use", "exists", "is there already", "there is no checkpoint", "not found")
        outcomes = [judge(end, words, commands) for end in ends]
        if not any("--overwrite" in command for command in commands):
            step = check_run(folder / "out/distilled", commands)
            if RESUME in commands and step != EPOCHS * EPOCH:
                raise Finding("wrong result", f"{commands}: the run ended after step {step}: {ends}")
        yield " and ".join(sorted(outcomes))


torch.set_num_threads(1)

HANG = 300.0  # seconds: longer than the patience with all commands of a case, which says more
TARGETS = (
    Target("commands: changed data", changed_data, hang=HANG, is_slow=True),
    Target("commands: no permission", no_permission, hang=HANG, is_slow=True),
    Target("commands: no room", no_room, hang=HANG, is_slow=True),
    Target("commands: no reader", no_reader, hang=HANG, is_slow=True),
    Target("commands: two at once", two_at_once, hang=HANG, is_slow=True),
)
