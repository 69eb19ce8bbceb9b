"""Carrying out runs: what they need is made first, what is finished or under way elsewhere is left alone.

A result is one JSON file a run. What cannot be committed, such as weights, is in the work folder. Several processes may
work on one suite: each run has a lock, and one that was stopped begins anew.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import tardkd
from tardkd.data import build_loader
from tardkd.files import FolderInUseError, FolderLock, replacing, write_text
from tardkd.train.evaluate import evaluate
from tardkd.train.models import build_model

from .balance import Balance
from .data import open_split, prepare
from .learners import Method, build_learner
from .models import Pretrained, build_pretrained
from .suites import DATA, METHODS, PAIRS, TEACHER, Run
from .train import train
from .trunks import fold_norms


class NotYetError(RuntimeError):
    """What a run needs is being made by another process."""


@dataclass(frozen=True)
class Places:
    """Where things are."""

    data: Path  # the data sets' folders
    weights: Path  # files of ImageNet classifiers
    work: Path  # resized images and trained weights
    results: Path  # one JSON file a run

    def result(self, run: Run) -> Path:
        return self.results / f"{run.name}.json"

    def trained(self, run: Run) -> Path:
        return self.work / "trained" / run.name / "last.pt"


def work_off(runs: Iterable[Run], places: Places) -> None:
    """Carry out all runs, in order, that are not finished; ends when nothing is left that this process could do."""
    _circumstances()
    waiting = [run for run in runs if not places.result(run).exists()]
    while waiting:
        done = [run for run in waiting if _attempt(run, places)]
        waiting = [run for run in waiting if not places.result(run).exists()]
        if waiting and not done:
            print(f"{len(waiting)} runs are under way elsewhere")
            return


def _attempt(run: Run, places: Places) -> bool:
    """Carry out a run, unless another process does; says whether it was done here."""
    try:
        with _locked(places.trained(run).parent):
            if places.result(run).exists():
                return False
            print(f"{run.name} begins at {time.strftime('%H:%M:%S')}", flush=True)
            result = _carry_out(run, places)
            places.result(run).parent.mkdir(parents=True, exist_ok=True)
            write_text(places.result(run), json.dumps(result, indent=1))
            print(f"{run.name}: {result['AP']:.1f} AP, {result['cpu_seconds']:.0f} s of a core", flush=True)
            return True
    except (FolderInUseError, NotYetError):
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with FolderLock(folder) as lock:
        lock.take()
        yield


def _carry_out(run: Run, places: Places) -> dict[str, Any]:
    twin = _find_twin(run, places)
    if twin is not None:
        shutil.copy(places.trained(twin), places.trained(run))
        return {**json.loads(places.result(twin).read_text()), "pair": run.pair}
    method = Method() if run.method == TEACHER else METHODS[run.method].scaled(run.factor)
    folder = _prepared(run, places)
    train_set, val_set = (
        open_split(DATA[run.data], folder, split, augment=split == "train") for split in ("train", "val")
    )
    teacher = _teacher(run, places, len(val_set.class_names)) if method.needs_teacher else None
    torch.manual_seed(run.seed)
    student = _build(run, places, len(val_set.class_names))
    learner = build_learner(method, student, teacher, val_set.class_names)
    balance = Balance(method.share, lasting=method.lasting) if method.needs_teacher else None
    result = train(learner, balance, train_set, val_set, run.budget, run.seed)
    with replacing(places.trained(run)) as temporary:
        torch.save(student.state_dict(), temporary)
    return {**asdict(run), **_circumstances(), "settings": asdict(method), **result, "finished": time.strftime("%F %T")}


def _find_twin(run: Run, places: Places) -> Run | None:
    """A run in another pair which is this one by another name: the teacher that this pair borrows, which is trained
    where nobody has; or the same student alone, if it is finished."""
    if run.method == TEACHER:
        return None if run.origin == run else _made(run.origin, places)
    if METHODS[run.method].needs_teacher:
        return None
    pair = PAIRS[run.pair]
    for name, other in PAIRS.items():
        twin = replace(run, pair=name)
        is_same = (other.student, other.student_size) == (pair.student, pair.student_size)
        if is_same and twin.budget == run.budget and places.result(twin).exists():
            return twin
    return None


def evaluate_test(runs: Iterable[Run], places: Places) -> None:
    """Add the precision on the test split to the results of the runs that are finished and have none yet."""
    for run in runs:
        path = places.result(run)
        result = json.loads(path.read_text()) if path.exists() else None
        if result is None or "test" in result:
            continue
        dataset = open_split(DATA[run.data], _prepared(run, places), "test")
        student = _build(run, places, len(dataset.class_names))
        student.load_state_dict(torch.load(places.trained(run), weights_only=True))
        loader = build_loader(dataset, batch_size=run.budget.batch, shuffle=False, seed=0, epoch=0)
        write_text(path, json.dumps({**result, "test": evaluate(student, loader, dataset)}, indent=1))


def _prepared(run: Run, places: Places) -> Path:
    data = DATA[run.data]
    folder = places.work / "data" / data.folder  # each its own, so that one in the making keeps nobody from the others
    with _locked(folder):
        return prepare(data, places.data, folder)


def _teacher(run: Run, places: Places, num_classes: int) -> nn.Module:
    """The pair's trained teacher; trains it where nobody has."""
    of_teacher = _made(Run(run.data, run.pair, TEACHER, seed=0), places)
    teacher = _build(of_teacher, places, num_classes)
    teacher.load_state_dict(torch.load(places.trained(of_teacher), weights_only=True))
    fold_norms(teacher.requires_grad_(False))
    return teacher


def _made(run: Run, places: Places) -> Run:
    """The run, finished: by others, or here and now."""
    if not places.result(run).exists() and not _attempt(run, places):
        raise NotYetError(run.name)
    return run


def _build(run: Run, places: Places, num_classes: int) -> nn.Module:
    settings, geometry = run.model, DATA[run.data].geometry
    if run.method != TEACHER:
        geometry = geometry.scaled(PAIRS[run.pair].student_size)
    if isinstance(settings, Pretrained):
        model = build_pretrained(settings, geometry, num_classes, places.weights)
    else:
        own = {
            "min_size": geometry.short,
            "max_size": geometry.long,
            "anchor_sizes": geometry.anchors[: len(settings.blocks) + 1],
            "canonical_scale": geometry.canonical,
        }
        model = build_model(settings.model_copy(update=own), num_classes)
    return model.to(memory_format=torch.channels_last)  # the faster one on a CPU


@cache  # of this process: its code stays what it was at the start
def _circumstances() -> dict[str, Any]:
    """Where and of what a result is: "library" is the last commit that has changed what is measured."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", *command], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()

    root = Path(__file__).parents[2]
    return {
        "commit": git("rev-parse", "--short", "HEAD"),
        "library": git("log", "-1", "--format=%h", "--", *(str(root / part) for part in ("tardkd", "csrc"))),
        "is_changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"tardkd": tardkd.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
