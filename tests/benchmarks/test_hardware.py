"""The order of the steps on a machine with a GPU, and what is left where they are cut off."""

from __future__ import annotations

import json
import sys

import hardware
import pytest

MACHINE = {"device": "a GPU", "capability": "9.0"}


@pytest.fixture
def main(monkeypatch, tmp_path):
    """Runs it with steps that do nothing but what a function, given their names, says."""

    def run(step):
        monkeypatch.setattr(sys, "argv", ["hardware.py", str(tmp_path)])
        monkeypatch.setattr(hardware, "describe_machine", lambda: dict(MACHINE))
        monkeypatch.setattr(hardware, "output_of", lambda *command, cwd=None: "")
        monkeypatch.setattr(hardware.Runner, "_run", lambda self, name, *rest: step(name))
        hardware.main()

    return run


def test_benchmarks_come_first_and_sanitizers_last(main):
    seen = []
    main(lambda name: seen.append(name) or "passed")
    assert seen == ["install", "benchmarks", "gpu", "ops", "sanitizer"]


def test_what_was_done_is_on_record_when_the_rest_is_cut_off(main, tmp_path):
    def step(name):
        if name == "gpu":
            raise KeyboardInterrupt
        return "passed"

    with pytest.raises(KeyboardInterrupt):
        main(step)
    record = json.loads((tmp_path / "record.json").read_text())
    assert [step["step"] for step in record["steps"]] == ["install", "benchmarks"]
    assert record["device"] in (tmp_path / "record.md").read_text()


def test_a_step_that_failed_fails_the_whole_after_the_others(main, tmp_path):
    with pytest.raises(SystemExit):
        main(lambda name: "failed with exit status 1" if name == "benchmarks" else "passed")
    assert len(json.loads((tmp_path / "record.json").read_text())["steps"]) == 5
