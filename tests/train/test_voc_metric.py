"""VOC's average precision at IoU 0.5, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tardkd.train.voc_metric import voc_ap50


def data(*annotations):
    listed = [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "iscrowd": difficult}
        for i, (image, category, box, difficult) in enumerate(annotations, start=1)
    ]
    return SimpleNamespace(coco=SimpleNamespace(dataset={"annotations": listed}), category_ids=[1, 2])


def found(*results):
    return [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in results
    ]


BOX, FAR, HALF = [0, 0, 10, 10], [50, 50, 10, 10], [0, 0, 10, 4]


def test_right_wrong_right():
    """Precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1: made monotonous 1, 2/3, 2/3."""
    dataset = data((1, 1, BOX, 0), (1, 1, FAR, 0))
    results = found((1, 1, BOX, 0.9), (1, 1, [20, 20, 5, 5], 0.8), (1, 1, FAR, 0.7))
    assert voc_ap50(results, [1], dataset) == pytest.approx(100 * (0.5 * 1 + 0.5 * 2 / 3))


def test_the_second_on_an_object_is_wrong():
    assert voc_ap50(found((1, 1, BOX, 0.9), (1, 1, BOX, 0.8)), [1], data((1, 1, BOX, 0), (1, 1, FAR, 0))) == 50
    reversed_scores = found((1, 1, HALF, 0.9), (1, 1, BOX, 0.8))
    assert voc_ap50(reversed_scores, [1], data((1, 1, BOX, 0))) == 50  # IoU 0.4 is wrong, and comes first


def test_difficult_objects_count_neither_way():
    dataset = data((1, 1, BOX, 0), (1, 1, FAR, 1))
    assert voc_ap50(found((1, 1, FAR, 0.9), (1, 1, FAR, 0.85), (1, 1, BOX, 0.8)), [1], dataset) == 100
    assert voc_ap50(found((1, 1, BOX, 0.8)), [1], dataset) == 100
    assert voc_ap50([], [1], data((1, 1, BOX, 1))) is None


def test_classes_images_and_nothing():
    dataset = data((1, 1, BOX, 0), (1, 2, BOX, 0), (2, 1, BOX, 0))
    assert voc_ap50(found((1, 1, BOX, 0.9)), [1], dataset) == 50  # class 2 has none; image 2 is not looked at
    assert voc_ap50(found((1, 2, BOX, 0.9), (1, 1, BOX, 0.9)), [1], dataset) == 100
    assert voc_ap50([], [1], dataset) == 0
    assert voc_ap50(found((3, 1, BOX, 0.9)), [1], dataset) == 0  # an image without objects
