"""Images and targets as they are often given wrongly."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectors.tiny import tiny_batch, tiny_detector
from torch import Tensor, nn

from tardkd.detectors.base import HeadSettings, InputBatch
from tardkd.distill import Distiller
from tardkd.distill.inputs import IMAGE_STEPS, batch_fault, range_fault

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def pair(student: nn.Module | None = None) -> Distiller:
    return Distiller(student or tiny_detector(), tiny_detector(seed=1))


# --- targets ------------------------------------------------------------------------------------------------


def test_labels_counted_from_0() -> None:
    images, targets = tiny_batch()
    targets[0]["labels"] -= 1
    targets[0]["image_id"] = torch.tensor(17)
    with pytest.raises(ValueError, match=r"image 0 \(image_id 17\): box 0 has the label 0; 0 is the background"):
        pair()(images, targets)


def test_labels_beyond_the_heads_classes() -> None:
    images, targets = tiny_batch()
    targets[1]["labels"][0] = 4
    message = (
        r"image 1: box 0 has the label 4; the student's head has 3 classes .*\(4 logits\), whose labels are 1 to 3"
    )
    with pytest.raises(ValueError, match=message):
        pair()(images, targets)


def test_a_negative_label() -> None:
    images, targets = tiny_batch()
    targets[1]["labels"][0] = -1
    with pytest.raises(ValueError, match="image 1: box 0 has the label -1"):
        pair()(images, targets)


def test_a_box_without_extent() -> None:
    images, targets = tiny_batch()
    targets[0]["boxes"][1] = torch.tensor([30.0, 20.0, 25.0, 60.0])
    message = (
        r"image 0: box 1 \[30, 20, 25, 60\] has x2 <= x1 or y2 <= y1; boxes must be .*is it \[x, y, width, height\]"
    )
    with pytest.raises(ValueError, match=message):
        pair()(images, targets)


def test_boxes_that_all_look_like_xywh() -> None:
    images, targets = tiny_batch()
    for target in targets:
        target["boxes"] = torch.tensor([[40.0, 30.0, 10.0, 20.0]]).repeat(len(target["labels"]), 1)
    with pytest.raises(ValueError, match=r"image 0: box 0 .*so have 3 of the batch's 3: .*look like \[x, y, width"):
        pair()(images, targets)


def test_it_is_seen_in_any_step() -> None:
    distiller, (images, targets) = pair(), tiny_batch()
    for _ in range(20):
        with torch.no_grad():
            distiller(images, targets)
    targets[0]["labels"][0] = 0
    with pytest.raises(ValueError, match="image 0: box 0 has the label 0"):
        distiller(images, targets)


@pytest.mark.parametrize(
    "head, label, words",
    [
        (HeadSettings("last", "softmax", (1, 1, 1, 1), (4, 12)), 0, None),
        (HeadSettings("last", "softmax", (1, 1, 1, 1), (4, 12)), 3, "3 classes .*labels are 0 to 2"),
        (HeadSettings("last", "sigmoid", (1, 1, 1, 1), (4, 16)), 3, None),
        (HeadSettings("first", "sigmoid", (1, 1, 1, 1), (4, 16)), 4, None),
        (HeadSettings("first", "sigmoid", (1, 1, 1, 1), (4, 16)), 5, "4 classes .*labels are 1 to 4"),
        (HeadSettings("first", "softmax", (1, 1, 1, 1), None), 99, None),
        (HeadSettings("first", "softmax", (1, 1, 1, 1), None), 0, "0 is the background"),
    ],
)
def test_labels_are_judged_by_the_heads_conventions(head: HeadSettings, label: int, words: str | None) -> None:
    targets = [{"boxes": torch.tensor([[0.0, 0.0, 2.0, 2.0]]), "labels": torch.tensor([label])}]
    fault = batch_fault(targets, head)
    assert (fault is None) == (words is None)
    if words is not None:
        assert re.search(words, fault)


@pytest.mark.parametrize(
    "broken", [{}, {"boxes": torch.zeros(1, 5), "labels": torch.ones(1)}], ids=["empty", "5 columns"]
)
def test_what_is_no_target_at_all_is_left_to_the_detector(broken: dict[str, Any]) -> None:
    images, targets = tiny_batch()
    with pytest.raises((AssertionError, KeyError)):  # torchvision's own
        pair()(images, [targets[0], broken])


def test_images_without_objects_are_fine() -> None:
    pair()(*tiny_batch(empty=True))


def test_the_plain_student_is_left_alone() -> None:
    images, targets = tiny_batch()
    targets[0]["labels"] -= 1
    Distiller(tiny_detector(), None, enabled=False)(images, targets)


# --- images -------------------------------------------------------------------------------------------------


def normalised(image: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return (image - mean) / std


def messages(distiller: Distiller, change: Callable[[Tensor], Tensor], steps: int = 2) -> list[str]:
    images, targets = tiny_batch()
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(steps):
            distiller([change(image) for image in images], targets)
    return [str(warning.message) for warning in caught if "images have values" in str(warning.message)]


def test_bytes() -> None:
    images, targets = tiny_batch()
    with pytest.raises(TypeError, match="image 0 is uint8; images must be floating point in"):
        pair()([(image * 255).to(torch.uint8) for image in images], targets)


def test_images_in_0_to_255_are_warned_of_once() -> None:
    (message,) = messages(pair(), lambda image: image * 255)
    assert "from 0.0" in message and "divide them by 255" in message


def test_images_normalised_twice_are_warned_of_once() -> None:
    (message,) = messages(pair(), normalised)
    assert "normalised twice" in message


def test_images_as_they_should_be() -> None:
    assert messages(pair(), lambda image: image) == []
    assert messages(pair(), lambda image: image * 1.1 - 0.05) == []  # what a sharp resize may do


@pytest.mark.parametrize("change", [normalised, lambda image: image * 255], ids=["normalised", "in 0..255"])
def test_a_student_that_does_not_normalise_takes_any_image(change: Callable[[Tensor], Tensor]) -> None:
    student = tiny_detector(image_mean=[0.0, 0.0, 0.0], image_std=[1.0, 1.0, 1.0])
    assert messages(pair(student), change) == []


def test_a_student_made_for_0_to_255() -> None:
    caffe = InputBatch(torch.zeros(0), [], (103.5, 116.3, 123.7), (1.0, 1.0, 1.0))
    assert range_fault(0, 255, caffe) is None
    assert "multiply them by 255" in (range_fault(0, 1, caffe) or "")
    assert "normalised twice" in (range_fault(-120, 150, caffe) or "")


def test_only_the_first_steps_are_read() -> None:
    distiller = pair()
    assert messages(distiller, lambda image: image, IMAGE_STEPS) == []
    assert messages(distiller, lambda image: image * 255) == []
