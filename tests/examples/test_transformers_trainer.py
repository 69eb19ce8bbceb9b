from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")


def run(module, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["transformers_trainer.py", "--images", "8", "--steps", "2", *arguments])
    module.main()


def test_a_teacher_helps_a_student(example, monkeypatch):
    """Both commands of the example's first lines, with fewer images and steps."""
    module = example("transformers_trainer")
    run(module, monkeypatch, "--depth", "2", "--out", "teacher")
    run(module, monkeypatch, "--depth", "1", "--out", "student", "--teacher", "teacher")
    model, report = transformers.RTDetrV2ForObjectDetection.from_pretrained("student", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and model.config.num_labels == 6


def test_three_lines_are_marked_as_added(example):
    with open(example("transformers_trainer").__file__, encoding="utf-8") as file:
        assert file.read().count("(+)") == 3 + 1  # and the explanation
