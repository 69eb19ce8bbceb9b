"""Ultralytics' own training with a teacher, where it is installed: two epochs on drawn squares, then two more."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("YOLO_OFFLINE", "1")
ultralytics = pytest.importorskip("ultralytics", exc_type=ImportError)

from tardkd.distill import DistillSettings  # noqa: E402

SIZE = 64
OPEN = dict(feature_gate="foreground", classification_gate="foreground", regression_gate="foreground")


def write_data(root: Path) -> Path:
    """Eight images of one bright square each, of two classes by its colour."""
    from PIL import Image

    for split in ("train", "val"):
        images, labels = root / "images" / split, root / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for number in range(4):
            left, side, kind = 4 + 6 * number, 30, number % 2
            image = Image.new("RGB", (SIZE, SIZE), (40, 40, 40))
            image.paste((220, 30, 30) if kind else (30, 30, 220), (left, 10, left + side, 10 + side))
            image.save(images / f"{number}.png")
            centre = (left + side / 2) / SIZE, (10 + side / 2) / SIZE
            (labels / f"{number}.txt").write_text(f"{kind} {centre[0]} {centre[1]} {side / SIZE} {side / SIZE}\n")
    data = root / "data.yaml"
    data.write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: [blue, red]\n")
    return data


def options(data: Path, **more: Any) -> dict[str, Any]:
    given = dict(
        data=str(data), imgsz=SIZE, batch=2, nbs=2, device="cpu", workers=0, amp=False, plots=False, verbose=False
    )
    return {**given, "project": str(data.parent / "runs"), "name": "run", "exist_ok": True, "optimizer": "SGD", **more}


def columns(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", encoding="utf-8") as file:
        return [{name.strip(): value for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "student, teacher",
    [("yolo11n.yaml", "yolo11s.yaml"), ("yolo26n.yaml", "yolo26n.yaml"), ("yolo11n.yaml", "yolo26n.yaml")],
)
def test_a_training_and_its_resumption(example, tmp_path, student, teacher):
    module = example("ultralytics_yolo")
    data = write_data(tmp_path / "data")
    large = ultralytics.YOLO(teacher)
    large.model = type(large.model)(teacher, nc=2, verbose=False)
    settings = DistillSettings(feature=0.1, **OPEN)

    yolo = ultralytics.YOLO(student)
    module.add_teacher(yolo, large, settings)
    adapters: list[Any] = []
    stopped: list[int] = []

    def watch(trainer: Any) -> None:
        distiller = trainer.model.criterion.distiller
        adapters.append([parameter.detach().clone() for parameter in distiller.adapters.parameters()])
        if trainer.epoch == 1 and not stopped:  # an interruption after the second epoch of three was saved
            stopped.append(trainer.epoch)
            raise KeyboardInterrupt

    yolo.add_callback("on_model_save", watch)
    with pytest.raises(KeyboardInterrupt):
        yolo.train(**options(data, epochs=3))
    folder = Path(yolo.trainer.save_dir)
    rows = columns(folder)
    assert float(rows[0]["train/distill_loss"]) > 0
    if teacher == "yolo11s.yaml":  # whose channels differ: the adapters learn, of those levels that have regions
        assert any(not torch.equal(old, new) for old, new in zip(*adapters))
    else:
        assert adapters == [[], []]

    # What is saved is plainly a model: it holds nothing of tardkd, and detects without it.
    last = folder / "weights" / "last.pt"
    checkpoint = torch.load(last, weights_only=False)
    assert checkpoint["ema"].criterion is None and type(checkpoint["ema"]) is type(large.model)
    plain = ultralytics.YOLO(student).load(last)
    plain.predict(torch.zeros(1, 3, SIZE, SIZE), verbose=False)

    again = ultralytics.YOLO(last)
    module.add_teacher(again, large, settings)
    seen: list[Any] = []

    def loaded(trainer: Any) -> None:
        distiller = trainer.model.criterion.distiller
        seen.append([parameter.detach().clone() for parameter in distiller.adapters.parameters()])

    again.add_callback("on_train_start", loaded)
    again.train(resume=True)
    assert all(torch.equal(old, new) for old, new in zip(adapters[-1], seen[0]))
    rows = columns(folder)
    assert len(rows) == 3 and float(rows[2]["train/distill_loss"]) > 0
