"""Checks of the data: files, boxes, classes, and what training and validation have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tardkd.data.coco import has_extent, missing_files
from tardkd.distill.findings import Finding, first, ok, problem, warning
from tardkd.train.build import build_dataset

from .report import describe_error
from .subject import Subject

OUTSIDE = 1.0  # pixels a box may stand over: annotation tools round
SYSTEMATIC = 0.05  # share of bad boxes that no slip of an annotator explains
EMPTY = 0.5  # share of images without objects that deserves a word


def check_train(subject: Subject) -> Iterator[Finding]:
    yield from _check_split(subject, "train", augment=True)


def check_val(subject: Subject) -> Iterator[Finding]:
    yield from _check_split(subject, "val", augment=False)


def _check_split(subject: Subject, split: str, *, augment: bool) -> Iterator[Finding]:
    try:
        dataset = build_dataset(subject.config, split, augment=augment)
    except (OSError, ValueError) as error:
        yield problem(describe_error(error), f"mend the files, or data.root and data.{split} if they are elsewhere")
        return
    setattr(subject, f"{split}_set", dataset)
    yield _images(dataset, range(len(dataset)) if subject.thorough else subject.sample(dataset))
    yield from _objects(dataset)
    yield from _boxes(dataset)


def _images(dataset: Any, chosen: range | list[int]) -> Finding:
    policy = getattr(dataset, "on_bad_image", "error")
    errors = []
    dataset.on_bad_image = "error"  # with "skip" another image would take the place of a bad one
    for index in chosen:
        try:
            dataset[index]
        except Exception as error:  # whatever a broken file does to its reader
            errors.append(describe_error(error))
    dataset.on_bad_image = policy
    numbers = {"images": len(dataset), "opened": len(chosen), "broken": len(errors)}
    if policy != "error":
        missing = missing_files(dataset.image_folder, [image["file_name"] for image in dataset.coco.imgs.values()], "")
        if errors or missing:
            return warning(
                f"{len(missing)} of the {len(dataset)} images are missing, {len(errors)} of the "
                f"{len(chosen)} opened cannot be used: {first(errors or missing, 3)}",
                "data.on_bad_image=skip does without them",
                **numbers,
                missing=len(missing),
            )
    if errors:
        return problem(
            f"{len(errors)} of the {len(chosen)} images opened cannot be used: {first(errors, 3)}",
            "mend these files or their entries; --thorough opens all of them",
            **numbers,
        )
    return ok(f"{len(dataset)} images, all there; {len(chosen)} opened, sizes as annotated", **numbers)


def _objects(dataset: Any) -> Iterator[Finding]:
    annotations = dataset.coco.dataset["annotations"]
    objects = [annotation for annotation in annotations if not annotation["iscrowd"]]
    crowds = len(annotations) - len(objects)
    empty = len(dataset) - len({annotation["image_id"] for annotation in objects})
    numbers = {"objects": len(objects), "crowds": crowds, "empty_images": empty}
    text = (
        f"{len(objects)} objects, {crowds} crowds (left out of the training); {empty} images "
        f"({empty / len(dataset):.0%}) without an object"
    )
    if not objects:
        yield problem(text, "nothing can be learned or measured here: is it the right annotation file?", **numbers)
    elif empty > EMPTY * len(dataset):
        yield warning(text, "is that meant? Such images teach what is background, and little else", **numbers)
    else:
        yield ok(text, **numbers)


def _boxes(dataset: Any) -> Iterator[Finding]:
    """Boxes as they were annotated, before reading clips them."""
    coco = dataset.coco
    objects = [annotation for annotation in coco.dataset["annotations"] if not annotation["iscrowd"]]
    if not objects:
        return
    boxes = torch.tensor([annotation["bbox"] for annotation in objects], dtype=torch.float64)
    images = [coco.imgs[annotation["image_id"]] for annotation in objects]
    limits = torch.tensor([[image["width"], image["height"]] for image in images], dtype=torch.float64)
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    inside = torch.cat([low.clamp(min=0).minimum(limits), high.clamp(min=0).minimum(limits)], dim=1)
    lost = ~has_extent(inside)
    outside = ((low < -OUTSIDE) | (high > limits + OUTSIDE)).any(dim=1) & ~lost

    def describe(chosen: torch.Tensor) -> tuple[str, str]:
        examples = [f"{boxes[i].tolist()} in {images[i]['file_name']}" for i in chosen.nonzero().flatten().tolist()]
        return f"{len(examples)} of {len(boxes)} boxes ({len(examples) / len(boxes):.1%})", first(examples, 3)

    hint = "boxes must be [x, y, width, height] in pixels of the stored image; is it [x1, y1, x2, y2], or another size?"
    for chosen, what, slip in (
        (lost, "have no extent within their image and are left out", "mend or remove them"),
        (outside, "stand over their image's border and are clipped", "look at these images"),
    ):
        if chosen.any():
            count, places = describe(chosen)
            many = chosen.double().mean() > SYSTEMATIC
            yield (problem if many else warning)(
                f"{count} {what}: {places}", hint if many else slip, boxes=int(chosen.sum())
            )
    if not (lost | outside).any():
        yield ok("all boxes lie within their images")


def check_classes(subject: Subject) -> Iterator[Finding]:
    train, val = subject.train_set, subject.val_set
    if train.class_names != val.class_names:
        only = [
            f"only {name} has {first(sorted(own - other))}"
            for name, own, other in (
                ("training", set(train.class_names), set(val.class_names)),
                ("validation", set(val.class_names), set(train.class_names)),
            )
            if own - other
        ]
        yield problem(
            f"training and validation have different classes: {'; '.join(only) or 'their order differs'}",
            "give both annotation files the same categories, with the same ids",
        )
    else:
        ids = train.category_ids
        plain = ids == list(range(1, len(ids) + 1))
        kind = "" if plain else f"; category ids {first(ids, 3)} do not count from 1 without gaps, which is fine"
        yield ok(f"{len(ids)} classes, the same in both: {first(train.class_names)}{kind}", category_ids=ids)
    for split, dataset, consequence in (
        ("training", train, "it cannot be learned: more images, or drop the class"),
        ("validation", val, "its AP will be missing from every table"),
    ):
        absent = [
            dataset.class_names[dataset.category_ids.index(i)] for i, count in _per_class(dataset).items() if not count
        ]
        if absent:
            yield warning(f"no {split} object of {first(absent)}", consequence, classes=absent)


def _per_class(dataset: Any) -> dict[int, int]:
    counts = Counter(
        annotation["category_id"] for annotation in dataset.coco.dataset["annotations"] if not annotation["iscrowd"]
    )
    return {category: counts[category] for category in dataset.category_ids}


def check_overlap(subject: Subject) -> Iterator[Finding]:
    train, val = _files(subject.train_set), _files(subject.val_set)
    shared = sorted(name for name in train.keys() & val.keys() if _same(train[name], val[name]))
    if shared:
        yield warning(
            f"{len(shared)} of {len(val)} validation images are also trained on: {first(shared)}",
            "take them out of one of the two, else AP says how well they were learned by heart",
            shared=len(shared),
        )
    else:
        yield ok("no image is in both training and validation")


def _files(dataset: Any) -> dict[str, Path]:
    folder = getattr(dataset, "image_folder", Path())  # built-in scenes have names alone
    return {image["file_name"]: folder / image["file_name"] for image in dataset.coco.imgs.values()}


def _same(left: Path, right: Path) -> bool:
    """Whether two paths of one name are one image. In two folders 0001.jpg may be two: then bytes are counted."""
    try:
        return left == right or left.stat().st_size == right.stat().st_size
    except OSError:  # a missing file is no image of either
        return False
