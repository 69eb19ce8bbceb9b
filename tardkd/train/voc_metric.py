"""Pascal VOC's own average precision at IoU 0.5, beside COCO's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.mask import iou as box_iou

IOU = 0.5


def voc_ap50(results: Sequence[dict[str, Any]], image_ids: Sequence[int], dataset: Any) -> float | None:
    """Mean over the classes that have an object, in percent; None without any.

    The area below the precision made monotonous, over all recalls (VOC 2010 and later; Everingham et al. 2015). A
    detection belongs to the object that it overlaps most: the first one there is right, others are wrong, and on a
    difficult object none counts either way. Boxes are continuous, without the devkit's extra pixel.

    Args:
        results: COCO results, boxes [x, y, w, h].
        image_ids: the images that count.
        dataset: with ``coco`` annotations, in which ``iscrowd`` marks the difficult objects, and ``category_ids``.
    """
    images = set(image_ids)
    objects: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for annotation in dataset.coco.dataset["annotations"]:
        if annotation["image_id"] in images:
            objects[annotation["image_id"], annotation["category_id"]].append(annotation)
    precisions = [
        _average_precision([result for result in results if result["category_id"] == category], objects, category)
        for category in dataset.category_ids
    ]
    known = [value for value in precisions if value is not None]
    return 100 * float(np.mean(known)) if known else None


def _average_precision(
    detections: list[dict[str, Any]], objects: dict[tuple[int, int], list[dict[str, Any]]], category: int
) -> float | None:
    own = [thing for (_, of), group in objects.items() if of == category for thing in group]
    wanted = sum(not thing["iscrowd"] for thing in own)
    if not wanted:
        return None
    taken: set[int] = set()
    right = []  # whether each detection that counts is right, the surest first
    for detection in sorted(detections, key=lambda detection: -detection["score"]):
        group = objects.get((detection["image_id"], category), [])
        overlaps = (
            box_iou([detection["bbox"]], [thing["bbox"] for thing in group], [0] * len(group)) if group else [[0.0]]
        )
        best = int(np.argmax(overlaps[0]))
        if overlaps[0][best] < IOU:
            right.append(False)
        elif not group[best]["iscrowd"]:
            right.append(group[best]["id"] not in taken)
            taken.add(group[best]["id"])
    hits = np.cumsum(right)
    recall = np.concatenate([[0.0], hits / wanted])
    precision = np.maximum.accumulate((hits / np.arange(1, len(right) + 1))[::-1])[::-1] if right else np.zeros(0)
    return float(np.sum(np.diff(recall) * precision))
