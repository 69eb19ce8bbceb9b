from __future__ import annotations

import re

import torch


def run(module, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["torchvision_loop.py", "--images", "8", "--steps", "3", *arguments])
    module.main()


def test_a_teacher_helps_a_student(example, monkeypatch, capsys):
    """Both commands of the example's first lines, with fewer images and steps."""
    module = example("torchvision_loop")
    run(module, monkeypatch, "--backbone", "resnet34", "--out", "teacher.pt")
    assert "distill" not in capsys.readouterr().out
    run(module, monkeypatch, "--backbone", "resnet18", "--out", "student.pt", "--teacher", "teacher.pt")
    report = capsys.readouterr().out
    values = dict(re.findall(r"(distill_\w+) ([\d.]+)", report))
    assert list(values) == ["distill_feature", "distill_classification", "distill_regression"]
    assert float(values["distill_feature"]) > 0 and "3 steps" in report

    # What is written is a plain detector that works without tardkd's distiller.
    student = module.build("resnet18", 6).eval()
    student.load_state_dict(torch.load("student.pt", weights_only=True))
    assert set(student([torch.rand(3, 96, 96)])[0]) == {"boxes", "labels", "scores"}


def test_five_lines_are_marked_as_added(example):
    with open(example("torchvision_loop").__file__, encoding="utf-8") as file:
        assert file.read().count("(+)") == 5 + 1  # and the explanation
