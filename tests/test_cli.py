from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from train.recipe import tree

import tardkd
from tardkd import __version__, cli
from tardkd.train import checkpoint


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A recipe file, and the folder of its baseline as the command line trained it."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree(folder / "run")))
    assert cli.main(["train", "--config", str(recipe), "data.train=4", "--role", "baseline", "train.epochs=1"]) == 0
    return recipe, folder / "run" / "baseline"


def test_train_takes_overrides_anywhere(trained):
    _, run = trained
    config = checkpoint.load(run / "last.pt")["config"]
    assert (config["data"]["train"], config["train"]["epochs"]) == (4, 1)


def test_resume_and_overwrite(trained, capsys):
    recipe, run = trained
    command = ["train", "--config", str(recipe), "--role", "baseline", "data.train=4", "train.epochs=1"]
    assert cli.main(command) == 2
    assert f"output folder {run} is in use" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    assert f"{run}: AP " in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        cli.main([*command, "--resume", "--overwrite"])
    assert error.value.code == 2


def test_eval_gives_what_training_logged(trained, capsys, tmp_path):
    _, run = trained
    out = tmp_path / "metrics.json"
    assert cli.main(["eval", str(run), "--json", str(out)]) == 0
    assert f"{run}/last.pt on val, 2 images: AP " in capsys.readouterr().out
    assert json.loads(out.read_text()) == checkpoint.load(run / "last.pt")["metrics"]
    assert cli.main(["eval", str(run / "best.pt"), "--split", "test", "data.test=3"]) == 0
    assert "best.pt on test, 3 images" in capsys.readouterr().out
    assert cli.main(["eval", str(run), "--split", "test", "data.test=null"]) == 2
    assert "data.test: required here, but not given" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"tardkd {__version__}\n"


def test_train_says_nothing_or_everything(trained, tmp_path, capsys):
    recipe, _ = trained
    command = ["train", "--config", str(recipe), "--role", "baseline", "data.train=4", "train.epochs=1"]
    assert cli.main([*command, f"output={tmp_path}/quiet", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert cli.main([*command, f"output={tmp_path}/usual"]) == 0
    usual = capsys.readouterr().out
    assert cli.main([*command, f"output={tmp_path}/verbose", "-v"]) == 0
    verbose = capsys.readouterr().out
    assert "loss_rpn_box_reg" not in usual
    assert [line.split()[:4] for line in verbose.splitlines() if "loss_rpn_box_reg" in line] == [
        ["epoch", "1", "step", "1"],
        ["epoch", "1", "step", "2"],
    ]
    with pytest.raises(SystemExit):
        cli.main([*command, "--quiet", "--verbose"])


MISTAKES = {
    ("train", "--config", "absent.yaml"): "cannot read the configuration absent.yaml: No such file or directory",
    ("train", "--config", "{recipe}", "optimizer.lrr=1"): "override: optimizer.lrr: unknown key; did you mean lr?",
    ("train", "--config", "{recipe}", "train.epochs=none"): "train.epochs: Input should be a valid integer",
    ("train", "--config", "{recipe}", "teacher.weights=no.pt", "output={new}"): "there is no checkpoint at no.pt",
    ("train", "--config", "{recipe}", "train.device=cuda", "output={new}"): "torch finds no CUDA device",
    ("train", "--config", "{recipe}", "output={recipe}", "--role", "baseline"): "Not a directory",
    ("eval", "nothing"): "there is no checkpoint at nothing",
    ("eval", "{recipe}"): "as a checkpoint",
    ("eval", "{run}", "data.val=0"): "data.val: Input should be greater than 0, got 0",
    ("export", "{recipe}", "--out", "{new}.pt"): "as a checkpoint",
    ("demo", "--out", "{recipe}"): "is a file, not a folder",
}


@pytest.mark.parametrize("command, message", MISTAKES.items(), ids=[" ".join(words) for words in MISTAKES])
def test_mistakes_end_with_status_2_and_one_message(trained, tmp_path, capsys, command, message):
    if "cuda" in " ".join(command) and torch.cuda.is_available():
        pytest.skip("the message is for machines without CUDA")
    recipe, run = trained
    words = [word.format(recipe=recipe, run=run, new=tmp_path / "new") for word in command]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("tardkd: ") and "Traceback" not in error


def test_a_data_set_that_is_not_there_is_named(trained, tmp_path, capsys):
    recipe, _ = trained
    coco = (
        "data={kind: coco, root: here, train: {images: images, annotations: train.json}, "
        "val: {images: images, annotations: val.json}}"
    )
    assert cli.main(["train", "--config", str(recipe), coco, f"output={tmp_path}/x", "--role", "baseline"]) == 2
    assert "image folder not found: here/images" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "required: command"),
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "required: --config"),
        (["train", "--config", "x", "--rezume"], "unrecognized arguments: --rezume"),
        (["demo", "--out", "x", "--seeds", "0"], "must be at least 1"),
        (["export", "x", "--out", "y", "a=b"], "unrecognized arguments: a=b"),
    ],
)
def test_wrong_usage(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(words)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_optional_package_is_named(trained, capsys, monkeypatch):
    recipe, _ = trained
    for name in [name for name in sys.modules if name.startswith(("pydantic", "tardkd.train"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    assert cli.main(["train", "--config", str(recipe)]) == 2
    assert 'this command needs the package pydantic: pip install "tardkd[train]"' in capsys.readouterr().err


def test_errors_of_the_program_keep_their_traceback(monkeypatch):
    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr("tardkd.build_info", broken, raising=False)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["info"])


def test_traceback_on_request(trained):
    with pytest.raises(ValueError, match="unknown key"):
        cli.main(["--traceback", "train", "--config", str(trained[0]), "nonsense=1"])


def test_info_and_module(capsys):
    assert cli.main(["info"]) == 0
    assert "version" in capsys.readouterr().out
    shown = subprocess.run([sys.executable, "-m", "tardkd", "--help"], capture_output=True, text=True, check=True)
    assert all(name in shown.stdout for name in ("train", "eval", "export", "demo", "info"))


def test_help_needs_no_optional_package():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torchvision', 'pydantic', 'yaml', 'rich'))); "
        "from tardkd.cli import main; main(['--help'])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: tardkd" in shown.stdout


def test_results_are_written_whole_or_into_a_pipe(trained, tmp_path, capsys):
    _, run = trained
    out = tmp_path / "metrics.json"
    out.write_text("before")
    assert cli.main(["eval", str(run), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["AP"] is not None and [path.name for path in tmp_path.iterdir()] == [out.name]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert cli.main(["eval", str(run), "--json", str(pipe)]) == 0
    assert json.loads(os.read(reader, 100_000)) == json.loads(out.read_text()) and pipe.is_fifo()
    os.close(reader)
    assert cli.main(["eval", str(run), "--json", str(tmp_path)]) == 2
    assert f"cannot write {tmp_path}: Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "message",
    [
        "[third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer.",
        "[third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:1",
        "[third_party/gloo/gloo/transport/tcp/pair.cc:460] writev [127.0.0.1]:1: Broken pipe",
        "[third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1000ms for recv operation",
    ],
)
def test_a_process_whose_neighbour_has_gone_says_so(monkeypatch, capsys, message):
    def fail():
        raise RuntimeError(message)

    monkeypatch.setattr(tardkd, "build_info", fail)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "tardkd: process 1: ended, because another process has\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
def test_an_output_that_cannot_be_written_is_named():
    command = [sys.executable, "-m", "tardkd", "info"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "tardkd: cannot write to the standard output: No space left on device\n"
