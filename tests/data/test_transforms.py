from __future__ import annotations

import pytest
import torch
from torchvision.transforms import v2

from tardkd.data import build_transform
from tardkd.data.transforms import GREY, DetectionTransform


def item() -> tuple[torch.Tensor, dict]:
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 10:20, 30:50] = 255  # the first box
    target = {
        "boxes": torch.tensor([[30.0, 10, 50, 20], [2, 1, 8, 4]]),
        "labels": torch.tensor([2, 1]),
        "area": torch.tensor([150.0, 18]),
        "iscrowd": torch.zeros(2, dtype=torch.int64),
        "image_id": 5,
    }
    return image, target


def test_flip_moves_boxes_with_pixels():
    image, target = build_transform(flip=1)(*item())
    assert target["boxes"].tolist() == [[10, 10, 30, 20], [52, 1, 58, 4]]
    assert (image[:, 10:20, 10:30] == 255).all() and int(image.sum()) == 3 * 200 * 255
    assert target["labels"].tolist() == [2, 1] and target["area"].tolist() == [150, 18] and target["image_id"] == 5
    assert type(image) is torch.Tensor and type(target["boxes"]) is torch.Tensor


def test_nothing_asked_nothing_done():
    image, target = build_transform(flip=0)(*item())
    assert torch.equal(image, item()[0]) and torch.equal(target["boxes"], item()[1]["boxes"])


def test_scale_keeps_the_image_size_and_scales_about_its_centre():
    image, target = build_transform(flip=0, scale=(0.5, 0.5))(*item())
    assert image.shape == (3, 40, 60) and image[0, 0, 0] == GREY
    assert torch.allclose(target["boxes"], torch.tensor([[30.0, 15, 40, 20], [16, 10.5, 19, 12]]))
    assert torch.allclose(target["area"], torch.tensor([150.0 / 4, 18 / 4]))
    assert (image[:, 15:20, 30:40] == 255).float().mean() > 0.8


def test_boxes_that_leave_the_view_go_with_their_labels():
    _image, target = build_transform(flip=0, scale=(2, 2))(*item())
    assert target["boxes"].tolist() == [[30, 0, 60, 20]]  # the second box lies outside the middle half
    assert target["labels"].tolist() == [2] and len(target["area"]) == len(target["iscrowd"]) == 1
    assert target["area"].item() == pytest.approx(150 * (30 * 20) / 200)


def test_no_boxes():
    image, target = item()
    target = {key: value[:0] if isinstance(value, torch.Tensor) else value for key, value in target.items()}
    _, target = build_transform(flip=1, scale=(0.5, 1.5), shift=0.2, photometric=True)(image, target)
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


def test_deterministic_given_the_generator_and_random_otherwise():
    transform = build_transform(scale=(0.5, 1.5), shift=0.1, photometric=True)
    views = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        views.append(transform(*item()))
    assert torch.equal(views[0][0], views[1][0]) and torch.equal(views[0][1]["boxes"], views[1][1]["boxes"])
    assert not torch.equal(views[0][0], views[2][0])


def test_input_is_left_alone():
    image, target = item()
    build_transform(flip=1, scale=(2, 2), photometric=True)(image, target)
    assert torch.equal(image, item()[0])
    assert all(torch.equal(torch.as_tensor(target[key]), torch.as_tensor(value)) for key, value in item()[1].items())


def test_any_v2_transform_may_be_a_step():
    image, target = DetectionTransform(v2.Resize((80, 120)))(*item())
    assert image.shape == (3, 80, 120) and target["boxes"][0].tolist() == [60, 20, 100, 40]


@pytest.mark.parametrize(
    "settings, message",
    [({"flip": 1.5}, "flip"), ({"scale": (1.5, 0.5)}, "scale"), ({"scale": (0, 1)}, "scale"), ({"shift": 1}, "shift")],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        build_transform(**settings)


def white_share(image: torch.Tensor, box: torch.Tensor) -> float:
    x1, y1, x2, y2 = box.round().int().tolist()
    return float((image[:, y1:y2, x1:x2] > 200).float().mean())


@pytest.mark.parametrize(
    "settings",
    [
        {"zoom_out": 4.0},
        {"iou_crop": True},
        {"large_scale_jitter": (0.1, 2.0)},
        {"zoom_out": 2.0, "iou_crop": True, "large_scale_jitter": (0.5, 1.5)},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_boxes_go_with_what_they_hold(settings):
    """Through views of any kind the white rectangle stays in its box, and every box within the image."""
    transform = build_transform(flip=0.5, **settings)
    seen = sizes = 0
    for seed in range(60):
        torch.manual_seed(seed)
        image, target = transform(*item())
        height, width = image.shape[-2:]
        boxes, labels = target["boxes"], target["labels"]
        assert len(boxes) == len(labels) == len(target["area"]) == len(target["iscrowd"])
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= torch.tensor([width, height])).all()
        assert image.dtype == torch.uint8 and type(boxes) is torch.Tensor
        for box in boxes[labels == 2]:
            if (box[2:] - box[:2]).min() >= 4:
                seen += 1
                assert white_share(image, box) > 0.6, (seed, box)
        sizes += (height, width) != (40, 60)
    assert seen > 15
    assert (sizes == 0) == (list(settings) == ["large_scale_jitter"])


def test_large_scale_jitter_uses_its_whole_range():
    transform = build_transform(flip=0, large_scale_jitter=(0.1, 2.0))
    widths = []
    for seed in range(100):
        torch.manual_seed(seed)
        _, target = transform(*item())
        widths += (target["boxes"][:, 2] - target["boxes"][:, 0])[target["labels"] == 2].tolist()
    assert min(widths) < 6 and max(widths) > 30


WRONG = [{"zoom_out": 0.5}, {"large_scale_jitter": (2, 1)}, {"large_scale_jitter": (0, 1)}]


@pytest.mark.parametrize("settings", WRONG)
def test_wrong_settings_of_views(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        build_transform(**settings)
