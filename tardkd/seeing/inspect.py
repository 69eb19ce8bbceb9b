"""A trained distillation under the magnifying glass: pictures and a table of what the teacher taught on real images."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tardkd.distill.distiller import REGION_TERMS
from tardkd.files import replacing
from tardkd.seeing.region_plots import draw_overview, draw_page
from tardkd.seeing.regions import COLUMNS, TaughtRegions, detect, look_at, teachers_detections
from tardkd.train import checkpoint
from tardkd.train.build import build_dataset, check_classes, fit_images, load_student, pair, stored_config
from tardkd.train.config import Config, ConfigError
from tardkd.train.distributed import pick_device


def inspect_run(
    path: Path,
    out: Path,
    *,
    split: str = "val",
    count: int = 8,
    ids: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Write ``image_<id>.png`` for every image, ``overview.png`` over all, and ``regions.csv`` into ``out``.

    Args:
        path: a checkpoint of a distilled run; it says which data and teacher, unless ``overrides`` do.
        count: that many images, evenly spread over the split; all if there are fewer. ``ids``: these images instead.

    Returns:
        What the gates came to, in one line.

    Raises:
        ConfigError: the run was not a distilled one, an id is not in the split, or the teacher is elsewhere now.
    """
    state = checkpoint.load_trained(path)
    config = stored_config(state, path, list(overrides))
    _check_distilled(config, path)
    dataset = build_dataset(config, split)
    check_classes(path, state["classes"], f"data.{split}", dataset.class_names)
    indices = _choose(dataset, f"data.{split}", count, ids)
    distiller = pair(config, load_student(state, path), state["classes"]).to(pick_device(config.train.device))

    fit_images(dataset, distiller.student, *distiller.teachers)

    out.mkdir(parents=True, exist_ok=True)
    gate = config.distill.loss_spec(distiller.detector.head, "mean").regression_gate
    compared = "student" if gate == "vs_student" else "region"
    taught = []  # the regions of each image
    for index in indices:
        image, target = dataset[index]
        if target.get("unreadable"):  # which the data set has warned of
            continue
        pixels = image.float() / 255
        taught.append(look_at(distiller, pixels, target, seed=config.train.seed))
        columns = {
            "objects": target,
            "student": detect(distiller.detector, pixels),
            "teacher": teachers_detections(distiller, pixels),
        }
        name = f"image_{target['image_id']}.png"
        title = f"image {target['image_id']} of {split}, {path.parent.name}/{path.name}"
        draw_page(image, columns, taught[-1], dataset.class_names, out / name, title=title, compared=compared)
    if not taught:
        raise ConfigError(f"none of the {len(indices)} images of data.{split} can be read")
    with replacing(out / "regions.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *(row for regions in taught for row in regions.rows(dataset.class_names))])
    draw_overview(taught, dataset.class_names, out / "overview.png", compared=compared)
    return _summary(taught)


def _summary(taught: Sequence[TaughtRegions]) -> str:
    """Which share of the foreground regions of all images was taught what, in one line."""
    gates = torch.cat([regions.foreground().gates for regions in taught])
    images = "1 image" if len(taught) == 1 else f"{len(taught)} images"
    if not len(gates):
        return f"{images} without a foreground region"
    opened = gates.float().mean(0).tolist()
    shares = [f"{name} {share:.0%}" for name, share in zip(("features", "class", "box"), opened)]
    return f"{images}, {len(gates)} foreground regions; taught: {', '.join(shares)}"


def _check_distilled(config: Config, path: Path) -> None:
    if not config.distill.enabled:
        raise ConfigError(
            f"{path} was trained without a teacher (distill.enabled is false); inspect needs a distilled run"
        )
    if not any(config.distill.weights[name] for name in REGION_TERMS):
        raise ConfigError(
            f"{path} was distilled without a term of regions (distill.{', distill.'.join(REGION_TERMS)} "
            "are 0), so there are no gates to show"
        )
    for key, teacher in config.teachers.items():
        if teacher.weights not in (None, "DEFAULT") and not Path(teacher.weights).exists():
            raise ConfigError(
                f"{path} had the teacher {teacher.weights}, which is not there; {key}.weights=FILE says where it is now"
            )


def _choose(dataset: Any, where: str, count: int, ids: Sequence[int] | None) -> list[int]:
    """Positions in the data set, whose items are in the order of their ids."""
    if ids is None:
        count = min(count, len(dataset))
        return [i * len(dataset) // count for i in range(count)]
    positions = {image_id: i for i, image_id in enumerate(sorted(dataset.coco.imgs))}
    unknown = [str(image_id) for image_id in ids if image_id not in positions]
    if unknown:
        raise ConfigError(
            f"{where} has no image {', '.join(unknown)}; its {len(positions)} ids go from "
            f"{min(positions)} to {max(positions)}"
        )
    return [positions[image_id] for image_id in dict.fromkeys(ids)]
