"""Images, boxes, classes and what two splits have in common."""

from __future__ import annotations

import shutil

from .reports import doctor, edit, found


def test_a_missing_image(tmp_path, coco):
    (tmp_path / "data" / "images" / "train_00002.png").unlink()
    report = doctor(tmp_path, role="baseline", changes=coco)
    (text,) = found(report, "problem")
    assert "1 of 4 images" in text and "train_00002.png" in text and report.status == 1
    assert found(report, "ok", "validation") and found(report, "ok", "precision")  # what can go on goes on
    assert found(report, "skipped", "gradients") == ["needs training data -> "]


def test_an_image_that_cannot_be_read_or_has_another_size(tmp_path, coco):
    (tmp_path / "data" / "images" / "train_00001.png").write_bytes(b"no image")
    edit(tmp_path, "val", lambda data: data["images"][1].update(width=65))
    report = doctor(tmp_path, role="baseline", changes=coco)
    (text,) = found(report, "problem", "training data")
    assert "1 of the 4 images opened cannot be used: image id 1: cannot read image" in text
    assert "is 64x64, its annotation says 65x64" in found(report, "problem", "validation")[0]


def test_images_that_the_training_would_do_without(tmp_path, coco):
    """Where it is told to, and says nothing, the doctor says how many."""
    coco["data"]["on_bad_image"] = "skip"
    (tmp_path / "data" / "images" / "train_00001.png").write_bytes(b"no image")
    (tmp_path / "data" / "images" / "train_00003.png").unlink()
    (tmp_path / "data" / "images" / "val_00002.png").unlink()
    report = doctor(tmp_path, role="baseline", changes=coco)
    train, val = found(report, "warning", "training data")[0], found(report, "warning", "validation")[0]
    assert "1 of the 4 images are missing, 2 of the 4 opened cannot be used: image id 1: cannot read" in train
    assert "1 of the 2 images are missing, 1 of the 2 opened cannot be used" in val and "on_bad_image=skip" in val
    assert not found(report, "problem")


def test_a_missing_image_is_in_no_two_splits(tmp_path, coco):
    coco["data"].update(on_bad_image="skip", val={**coco["data"]["val"], "images": "other"})
    shutil.copytree(tmp_path / "data" / "images", tmp_path / "data" / "other")
    edit(tmp_path, "val", lambda data: data["images"][0].update(file_name="train_00001.png"))
    report = doctor(tmp_path, role="baseline", changes=coco)
    assert "1 of 2 validation images are also trained on: train_00001.png" in found(report, "warning", "overlap")[0]
    (tmp_path / "data" / "other" / "train_00001.png").unlink()
    report = doctor(tmp_path, role="baseline", changes=coco)
    assert "no image is in both" in found(report, "ok", "overlap")[0]


def test_boxes_outside_and_without_extent(tmp_path, coco):
    def break_some(data):
        data["annotations"][0]["bbox"] = [100, 10, 20, 20]
        data["annotations"][1]["bbox"] = [10, 10, 0, 20]
        for annotation in data["annotations"][2:5]:
            annotation["bbox"] = [40, 40, 50, 20]

    edit(tmp_path, "train", break_some)
    report = doctor(tmp_path, role="baseline", changes=coco)
    lost, outside = found(report, "problem")
    assert "2 of" in lost and "[100.0, 10.0, 20.0, 20.0] in train_00001.png" in lost
    assert "[x, y, width, height]" in lost
    assert "3 of" in outside and "stand over their image's border" in outside and report.status == 1
    assert "all boxes lie within" in found(report, "ok", "validation")[2]


def test_one_bad_box_among_many_is_a_warning(tmp_path, coco):
    def break_one(data):
        data["annotations"] = data["annotations"] * 10
        data["annotations"][0] = {**data["annotations"][0], "bbox": [10, 10, 20, 0]}

    edit(tmp_path, "train", break_one)
    report = doctor(tmp_path, role="baseline", changes=coco)
    assert not report.status and "1 of" in found(report, "warning", "training data")[0]


def test_other_classes_in_validation(tmp_path, coco):
    edit(tmp_path, "val", lambda data: data["categories"][0].update(name="bull's eye"))
    report = doctor(tmp_path, role="baseline", changes=coco)
    (text,) = found(report, "problem")
    assert "only training has target; only validation has bull's eye" in text and report.status == 1


def test_classes_without_an_object_crowds_empty_images_and_gaps(tmp_path, coco):
    def change(data):
        data["categories"].append({"id": 90, "name": "unicorn"})
        data["annotations"][0]["iscrowd"] = 1

    edit(tmp_path, "train", change)
    edit(tmp_path, "val", change)
    edit(tmp_path, "train", lambda data: data["images"].extend({**data["images"][0], "id": i} for i in range(90, 95)))
    report = doctor(tmp_path, role="baseline", changes=coco)
    assert "no training object of" in found(report, "warning", "classes")[0]
    assert "unicorn" in found(report, "warning", "classes")[0]
    assert "do not count from 1 without gaps, which is fine" in found(report, "ok", "classes")[0]
    assert "1 crowds" in found(report, "warning", "training data")[0]
    assert "5 images (56%) without an object" in found(report, "warning", "training data")[0]


def test_images_in_both_splits(tmp_path, coco, sound):
    coco["data"]["val"] = coco["data"]["train"]
    report = doctor(tmp_path, role="baseline", changes=coco)
    assert "4 of 4 validation images are also trained on: train_00001.png" in found(report, "warning", "overlap")[0]
    assert not found(sound, "warning", "overlap")
