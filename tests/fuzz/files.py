"""Files of every kind that is read, damaged: whatever they hold, the error is one that names them."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from tardkd import weights
from tardkd.data.coco import check_annotations, read_json
from tardkd.data.voc import read_voc
from tardkd.train import checkpoint
from tardkd.train.config import ConfigError, load_config
from tardkd.train.tables import TableError, read_table
from tests.data.test_fuzz import DATA, RECIPE, XML

from .cases import Finding, Target

DAMAGES = 10  # of the same file in one case
REFUSALS = (ValueError, ConfigError, TableError, weights.CheckpointError, OSError)
EVALUATIONS = 'epoch,step,AP,AP50,"AP/a ""b"", c",AP/caf\u00e9\n1,2,0.5,,1.25,\n2,4,1.5,3.5,,100\n'
TABLE = "epoch,step,loss/total,lr\n1,1,2.5,0.01\n1,2,2.25,0.01\n2,3,1.75,0.005\n"


def damaged(rng: random.Random, content: bytes) -> bytes:
    """The content with a few bits, bytes or pieces changed."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place = rng.randrange(len(data) + 1)
        length = rng.choice([1, 1, 2, 8, 64])
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place : place + length]
        elif kind == 2:
            data[place:place] = rng.randbytes(length)
        elif kind == 3:
            data[place:place] = data[place : place + length]
        elif kind == 4:
            del data[place:]
        else:
            data[place:place] = rng.choice(
                [b"nan", b"1e999", b"-1", b"null", b"[" * length, b"\x00", b"\xff\xfe", b'"']
            )
    return bytes(data)


def cases_of(name: str, content: Callable[[], bytes], read: Callable[[Path], Any]) -> Callable[[random.Random], Any]:
    """Cases that read the file ``name`` with damaged contents."""

    def run(rng: random.Random) -> Iterator[str]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(DAMAGES):
                path.write_bytes(damaged(rng, content()))
                yield attempt(lambda: read(path), path)

    return run


def attempt(read: Callable[[], Any], path: Path) -> str:
    try:
        read()
    except REFUSALS as error:
        if path.name not in str(error) and path.parent.name not in str(error):
            raise Finding("traceback", f"a refusal that does not name the file: {error!r}"[:400]) from error
        return "refused"
    return "read"


def read_voc_folder(path: Path) -> None:
    folder = path.parent.parent
    (folder / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets/Main/train.txt").write_text("a\n")
    check_annotations(read_voc(folder, "train"), str(path))


@functools.cache
def torch_file() -> bytes:
    """A small checkpoint as a run writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "last.pt"
        generator = torch.Generator().manual_seed(0)
        model = {f"layer{i}.weight": torch.randn(3, 4, generator=generator) for i in range(4)}
        checkpoint.save(path, {"model": model, "classes": ["a", "b"], "config": {}, "epoch": 1})
        return path.read_bytes()


def read_checkpoint(path: Path) -> None:
    """What is read is what was written: damage that nobody notices is a wrong result."""
    state = checkpoint.load(path)
    generator = torch.Generator().manual_seed(0)
    for i in range(4):
        tensor = state.get("model", {}).get(f"layer{i}.weight")
        if tensor is None or not torch.equal(tensor, torch.randn(3, 4, generator=generator)):
            raise Finding("wrong result", f"layer{i} is not what was written")


TARGETS = (
    Target(
        "annotations",
        cases_of("a.json", lambda: json.dumps(DATA).encode(), lambda p: check_annotations(read_json(p), str(p))),
    ),
    Target("VOC annotations", cases_of("Annotations/a.xml", XML.encode, read_voc_folder)),
    Target("recipes", cases_of("recipe.yaml", lambda: yaml.safe_dump(RECIPE).encode(), load_config)),
    Target("tables", cases_of("train.csv", TABLE.encode, read_table)),
    Target("tables of evaluations", cases_of("eval.csv", EVALUATIONS.encode, read_table)),
    Target("checkpoints", cases_of("last.pt", torch_file, read_checkpoint)),
)
