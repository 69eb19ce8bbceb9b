"""Names that are not ASCII, where the locale has nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import yaml
from train.recipe import tree

from tardkd.data.scenes import write_scenes
from tardkd.train import checkpoint

NAME = "cr\u00e8me \u2603"


def test_data_and_output_with_other_letters(tmp_path):
    """LANG=C alone: Python takes all files for UTF-8 then. What cannot be, as with PYTHONUTF8=0, is told."""
    data = tmp_path / "d\u00e5ta"
    write_scenes(data, splits={"train": 2, "val": 1}, image_size=64, seed=0)
    for split in ("train", "val"):
        path = data / f"annotations/{split}.json"
        path.write_text(path.read_text().replace('"ball"', f'"{NAME}"'), encoding="utf-8")
    split = {name: {"images": "images", "annotations": f"annotations/{name}.json"} for name in ("train", "val")}
    description = {**tree("\u00f6ut"), "data": {"kind": "coco", "root": "d\u00e5ta", **split}}
    description["train"]["epochs"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(description, allow_unicode=True), encoding="utf-8")
    train = [sys.executable, "-m", "tardkd", "train", "--config", "recipe.yaml", "--role", "baseline"]

    def run(*command, **environment):
        environment = {**os.environ, "LC_ALL": "C", "OMP_NUM_THREADS": "1", **environment}
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
        assert b"Traceback" not in ended.stderr
        return ended.returncode, (ended.stdout + ended.stderr).decode()

    status, shown = run(*train, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert status == 2
    assert r"d\xe5ta" in shown and "need a locale with UTF-8, or PYTHONUTF8=1; it is ascii" in shown, shown
    status, shown = run(*train, "output=\u00f6ut", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert status == 2 and "override 'output=" in shown, shown
    status, shown = run(*train)
    assert status == 0, shown
    assert NAME in checkpoint.load(tmp_path / "\u00f6ut/baseline/last.pt")["classes"]
    assert f"AP/{NAME}" in (tmp_path / "\u00f6ut/baseline/eval.csv").read_text(encoding="utf-8")
