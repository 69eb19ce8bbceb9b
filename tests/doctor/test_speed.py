"""How long a step takes."""

from __future__ import annotations

import pytest

from tardkd.doctor import speed

from .reports import doctor, found, numbers


def test_slow_loading_asks_for_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "_load", lambda subject, load=speed._load: (load(subject)[0], 30.0))
    report = doctor(tmp_path, "train.epochs=4", "train.eval_every=3", role="baseline")
    assert "raise train.workers" in found(report, "warning", "speed")[0]
    assert numbers(report, "speed", "seconds") == pytest.approx(4 * 3 * 30, rel=0.5)
    assert "4 epochs" in found(report, "ok", "speed")[1] and "2 evaluations" in found(report, "ok", "speed")[1]


def test_the_speed_parts_add_up(sound):
    step = numbers(sound, "speed", "step")
    parts = [numbers(sound, "speed", key) for key in ("student", "teacher", "rest")]
    assert all(part > 0 for part in parts[:2]) and sum(parts) >= step * 0.99


def test_fewer_regions_are_suggested_where_they_make_a_step_faster(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "SLOW", 0.0)
    heavy = [
        "student.box_batch_size_per_image=256",
        "student.head_dim=2048",
        "student.rpn_pre_nms_top_n_train=600",
        "student.rpn_post_nms_top_n_train=600",
    ]
    report = doctor(tmp_path, *heavy, role="baseline")
    (text,) = [text for text in found(report, "ok", "speed") if "regions" in text]
    assert "256 regions of an image train the box head; with 64 a step takes" in text
    assert "student.box_batch_size_per_image=64 may be enough" in text


@pytest.mark.parametrize("slow, regions", [(1e9, 256), (0.0, 128)], ids=["fast", "few"])
def test_fewer_regions_are_not_tried_for_nothing(tmp_path, monkeypatch, slow, regions):
    monkeypatch.setattr(speed, "SLOW", slow)
    report = doctor(tmp_path, f"student.box_batch_size_per_image={regions}", role="baseline")
    assert not [text for text in found(report, "ok", "speed") if "regions" in text]
