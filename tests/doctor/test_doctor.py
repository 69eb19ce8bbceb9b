"""What the doctor says of a sound recipe, and of recipes that are broken in one way each."""

from __future__ import annotations

import json

import yaml
from train.recipe import tree

from tardkd.cli import main

from .reports import doctor, found


def test_a_sound_recipe_has_no_problem_and_every_check_says_something(sound):
    assert found(sound, "problem") == [] and found(sound, "skipped") == [] and sound.status == 0
    assert list(dict.fromkeys(name for name, _ in sound.findings)) == [
        "configuration",
        "output",
        "device",
        "training data",
        "validation",
        "classes",
        "overlap",
        "optimizer",
        "models",
        "anchors",
        "precision",
        "gradients",
        "speed",
    ]
    texts = " ".join(finding.text for _, finding in sound.findings)
    for part in (
        "7 images, all there; 4 opened",
        "6 classes, the same in both",
        "(100%), 100.0% of its parameters",
        "3 training steps, all terms finite",
        "gradients reach all",
        "the teacher gets none",
        "foreground regions a step",
        "3 steps an epoch, ",
    ):
        assert part in texts, part


def test_the_command_prints_writes_json_and_returns_the_status(tmp_path, capsys):
    config, out = tmp_path / "recipe.yaml", tmp_path / "report.json"
    config.write_text(yaml.safe_dump(tree(tmp_path / "out")))
    command = ["doctor", "--config", str(config), "--role", "baseline", "--json", str(out), "--images", "2"]
    assert main([*command, "optimizer.lr=0.001"]) == 0
    printed = capsys.readouterr().out
    assert "the run can start" in printed and "Traceback" not in printed
    report = json.loads(out.read_text())
    assert report["problems"] == 0 and {finding["check"] for finding in report["findings"]} >= {"models", "speed"}
    assert not any("teacher" in finding["text"] for finding in report["findings"])
    assert main([*command, "optimizer.rate=1"]) == 1
    report = json.loads(out.read_text())
    assert "unknown key" in report["findings"][0]["text"]
    assert {finding["level"] for finding in report["findings"][1:]} == {"skipped"}


def test_voc_folders_and_a_teachers_own_training(tmp_path, coco):
    root = tmp_path / "voc"
    for part in ("Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    (tmp_path / "data" / "images").rename(root / "JPEGImages")
    for split in ("train", "val"):
        names = sorted(path.stem for path in (root / "JPEGImages").glob(f"{split}_*"))
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            (root / "Annotations" / f"{name}.xml").write_text(
                f"<annotation><filename>{name}.png</filename><size><width>64</width><height>64</height></size>"
                "<object><name>cat</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>40</xmax><ymax>40</ymax></bndbox>"
                "</object></annotation>"
            )
    report = doctor(tmp_path, role="teacher", changes={"data": {"kind": "voc", "root": str(root)}})
    assert found(report, "problem") == [] and found(report, "skipped") == []
    assert "1 classes, the same in both: cat" in found(report, "ok", "classes")[0]
