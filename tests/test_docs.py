"""What the documentation says can be done: its links lead somewhere and its code blocks run."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from detectors.tiny import tiny_batch, tiny_detector
from torch.distributed.run import get_args_parser
from train.recipe import tree

from tardkd import cli
from tardkd.train.config import parse_config

ROOT = Path(__file__).parents[1]
PAGES = sorted(page for folder in (".", "docs", "docs/api", "recipes") for page in (ROOT / folder).glob("*.md"))
PAGES += sorted(ROOT.glob("benchmarks/**/*.md"))
SHELL = ("", "sh")
LANGUAGES = (*SHELL, "python", "diff", "yaml", "text", "{eval-rst}", "{toctree}", "{include}", "{literalinclude}")
DEVELOPMENT = ("cmake", "ctest", "git", "ruff", "clang-format", "mypy", "pre-commit")  # what only CONTRIBUTING calls


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: Path
    line: int  # of its opening fence, from 1
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    """The code blocks of a page, or those in one of ``languages``."""
    lines = page.read_text(encoding="utf-8").splitlines()
    opened = None
    for number, line in enumerate(lines, start=1):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = number
            continue
        language = lines[opened - 1][3:].split(" ")[0]
        if not languages or language in languages:
            yield Block(page, opened, language, "\n".join(lines[opened : number - 1]) + "\n")
        opened = None
    assert opened is None, f"{page}:{opened}: a block that does not end"


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, *languages)]


# --- settings, links ----------------------------------------------------------------------------------------------


def settings():
    spec = importlib.util.spec_from_file_location("settings_reference", ROOT / "docs" / "settings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_reference_is_that_of_the_code():
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == settings().reference(), "run python docs/settings.py"


def test_every_setting_has_a_meaning():
    assert settings().undescribed() == []


def anchors(page: Path) -> set[str]:
    """What a code host makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    for link, anchor in links:
        if "://" in link:
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{link}#{anchor}"


# --- code blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", all_blocks(), ids=str)
def test_a_block_names_a_language_that_is_looked_at(block):
    """Output stands in ``text`` blocks; a block without a language is one of commands."""
    assert block.language in LANGUAGES


def preamble(folder: Path) -> dict[str, Any]:
    """What the pages' Python takes for granted: models, a loader, the tensors of the ops, and files in ``folder``."""
    torch.manual_seed(0)
    student, teacher = tiny_detector(seed=0), tiny_detector(seed=1)
    torch.save(teacher.state_dict(), folder / "teacher.pt")
    (folder / "my.yaml").write_text(yaml.safe_dump(tree(folder / "runs")), encoding="utf-8")
    corners = torch.rand(8, 2) * 32
    boxes = torch.cat([corners, corners + 16 + torch.rand(8, 2) * 16], dim=1)
    levels = [torch.randn(2, 4, 64 // stride, 64 // stride) for stride in (4, 8, 16, 32)]
    return {
        "torch": torch,
        "student": student,
        "teacher": teacher,
        "teacher_a": tiny_detector(seed=2, num_classes=3),
        "teacher_b": tiny_detector(seed=3, num_classes=3),
        "loader": [tiny_batch(seed=seed) for seed in range(2)],
        "student_features": [level.clone().requires_grad_() for level in levels],
        "teacher_features": levels,
        "proposals": list(boxes.split(4)),
        "student_logits": torch.randn(8, 5, requires_grad=True),
        "teacher_logits": torch.randn(8, 5),
        "student_deltas": torch.randn(8, 4, requires_grad=True),
        "teacher_deltas": torch.randn(8, 4),
        "labels": torch.arange(8) % 5,
        "gt_boxes": boxes + 2,
    }


def wandb() -> Any:
    """What the pages use of Weights & Biases; what is logged must be numbers."""

    def log(numbers: dict[str, Any], step: int) -> None:
        assert step > 0 and all(value is None or isinstance(value, (int, float)) for value in numbers.values())

    run = SimpleNamespace(log=log, finish=lambda: None)
    return SimpleNamespace(init=lambda project, config: run)


def run_python(page: Path, folder: Path) -> None:
    """The Python blocks of a page, one after another, as a reader would paste them."""
    names = preamble(folder)
    if page.name in PREAMBLES:
        names |= PREAMBLES[page.name](folder)
    for block in blocks(page, "python", "diff"):
        # With as many empty lines before it, an error names the page's own line.
        exec(compile("\n" * block.line + sides(block)[1], page, "exec"), names)


def sides(block: Block) -> tuple[str, str]:
    """What a block is without and with its changes; the same, where it is no diff."""
    if block.language != "diff":
        return block.text, block.text
    lines = block.text.splitlines(keepends=True)
    before, after = ([line[1:] or "\n" for line in lines if line[0] != sign] for sign in "+-")
    return "".join(before), "".join(after)


def transformers_preamble(folder: Path) -> dict[str, Any]:
    """What a script for transformers' Trainer has before its model: arguments, data, and two models in folders."""
    pytest.importorskip("transformers")
    from detectors.transformers.tiny import tiny_call, tiny_query_detector
    from transformers import TrainingArguments

    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_query_detector("rt_detr_v2", seed=seed).save_pretrained(folder / name)
    options = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False}
    return {
        "args": TrainingArguments("runs", max_steps=2, per_device_train_batch_size=1, **options),
        "train_set": [tiny_call(seed=seed) for seed in range(2)],
        "collate": lambda calls: calls[0],
        "images": [torch.rand(3, 64, 96)],
    }


def own_detector_preamble(folder: Path) -> dict[str, Any]:
    """The example's class, and two of LibreYOLO's models with a loader of what they take."""
    yolo9 = pytest.importorskip("libreyolo.models.yolo9.nn", exc_type=ImportError)
    spec = importlib.util.spec_from_file_location("libreyolo_yolo9", ROOT / "examples" / "libreyolo_yolo9.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    models = [yolo9.LibreYOLO9Model("t", nb_classes=3, img_size=64) for _ in range(2)]
    objects = torch.tensor([[[0, 0.1, 0.1, 0.6, 0.7]], [[2, 0.2, 0.2, 0.8, 0.8]]])
    return {
        "YOLO9Detector": module.YOLO9Detector,
        "student": models[0].train(),
        "teacher": models[1],
        "loader": [(torch.rand(2, 3, 64, 64), objects)],
        "total_epochs": 1,
    }


PREAMBLES = {"transformers.md": transformers_preamble, "your-own-detector.md": own_detector_preamble}


@pytest.mark.parametrize("block", all_blocks("diff"), ids=str)
def test_a_diff_is_code_before_and_after_and_short(block):
    for side in sides(block):
        compile(side, str(block), "exec")
    assert sum(line.startswith("+") for line in block.text.splitlines()) <= 10


@pytest.mark.parametrize(
    "page", sorted({block.page for block in all_blocks("python", "diff")}), ids=lambda page: page.name
)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "wandb" in page.read_text(encoding="utf-8"):  # other libraries look whether there is one
        monkeypatch.setitem(sys.modules, "wandb", wandb())
    run_python(page, tmp_path)


def test_python_with_a_wrong_name_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page.write_text(readme.replace("student_scales=", "student_scale="), encoding="utf-8")
    with pytest.raises(TypeError, match="student_scale"):
        run_python(page, tmp_path)


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=str)
def test_yaml_is_a_part_of_a_recipe(block, tmp_path):
    """What a block does not say is that of the smallest recipe."""
    parse_config({**tree(tmp_path), **yaml.safe_load(block.text)}, source=str(block))


# --- commands -----------------------------------------------------------------------------------------------------


def commands(block: Block) -> list[str]:
    """The single commands of a block's lines, without comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.split(r"&&", re.sub(r"(^|\s)#.*", "", line))]
    return [part.strip() for part in parts if part.strip()]


def all_commands() -> list[str]:
    return sorted({command for block in all_blocks(*SHELL) for command in commands(block)})


def check_command(command: str) -> None:
    """Raises where a program, an option, a file of the repository or an extra is not known."""
    program, *arguments = shlex.split(command)
    if program == "tardkd":
        cli._parse(arguments)
    elif program == "torchrun":
        launched = get_args_parser().parse_args(arguments)
        assert launched.module and launched.training_script == "tardkd"
        cli._parse(launched.training_script_args)
    elif program == "pip":
        assert arguments[0] == "install"
        _, extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")
        known = re.findall(r"^(\w+) = \[", extras.split("\n[")[0], re.MULTILINE)
        for wanted in re.findall(r"^\.\[(.+)\]$", "\n".join(arguments), re.MULTILINE):
            assert set(wanted.split(",")) <= set(known)
    elif program == "pytest":
        paths = [argument for argument in arguments if "/" in argument or argument.isalpha()]
        assert all((ROOT / path).exists() for path in paths if path not in ("slow", "gpu", "ptx"))
    elif program in ("python", "python3"):
        if arguments[0] == "-m":
            module = arguments[1]
            is_here = (ROOT / module.replace(".", "/")).is_dir()  # of the checkout, from whose root it is called
            assert is_here or module in ("sphinx", "build") or importlib.util.find_spec(module), module
        else:
            assert (ROOT / arguments[0]).is_file(), arguments[0]
    else:
        assert program in DEVELOPMENT or (ROOT / program).exists(), program


@pytest.mark.parametrize("command", all_commands())
def test_commands_are_understood(command):
    check_command(command)


@pytest.mark.parametrize("block", all_blocks(*SHELL), ids=str)
def test_shell_blocks_are_shell(block):
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


@pytest.mark.parametrize(
    "command",
    [
        "tardkd trian --config my.yaml",
        "tardkd plot runs/a --output curves.png",
        "torchrun --procs 4 -m tardkd train --config my.yaml",
        "torchrun --nproc-per-node 4 -m tardkd train --recipe my.yaml",
        "pip install .[trian]",
        "python examples/no_such_file.py",
        "pytest tests/no_such_folder",
        "tadkd info",
    ],
)
def test_wrong_commands_are_found(command):
    with pytest.raises((AssertionError, SystemExit)):
        check_command(command)


@pytest.mark.parametrize(
    "config", sorted({word for command in all_commands() for word in command.split() if word.startswith("recipes/")})
)
def test_recipes_that_are_named_are_there(config):
    assert (ROOT / config).exists()


# --- commands that are cheap enough to run ------------------------------------------------------------------------

# They want data, or minutes, or (TorchScript) a student whose scores differ by more than rounding.
ELSEWHERE = ("PATH", "elsewhere", "recipes/", "--ids", "tardkd demo", "torchrun", ".ts")
RUNNABLE = r"tardkd (info|train|doctor|eval|plot|inspect|export) ?"


def three_runs() -> list[str]:
    (block,) = [block for block in blocks(ROOT / "docs/training.md", "sh") if "tardkd plot" in block.text]
    return commands(block)


def runnable() -> list[str]:
    """Commands of the pages that work with the runs of my.yaml, under their names, and do more than "Three runs"."""
    found = [command for command in all_commands() if re.match(RUNNABLE, command)]
    found = [command for command in found if not any(word in command for word in (*ELSEWHERE, "my.yaml"))]
    renamed = {
        " ".join(re.sub(r"runs/(bccd|demo/seed0)", "runs/mine", re.sub("RUN", "runs/mine/distilled", command)).split())
        for command in found
    }
    return sorted(renamed - {" ".join(command.split()) for command in three_runs()})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder in which the commands of "Three runs" have run, with the smallest recipe as my.yaml."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "my.yaml").write_text(yaml.safe_dump(tree(Path("runs/mine"))), encoding="utf-8")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in three_runs():
            _, *arguments = shlex.split(command)
            # A teacher of two epochs knows nothing, and doctor says so by its status.
            assert cli.main(arguments) in ((0, 1) if arguments[0] == "doctor" else (0,)), command
    torch.set_num_threads(threads)
    return folder


def test_the_three_runs_leave_what_the_page_promises(trained):
    assert {"curves.png", "pictures", "student.pt", "runs"} <= {path.name for path in trained.iterdir()}


@pytest.mark.parametrize("command", runnable())
def test_commands_run(command, trained, monkeypatch):
    monkeypatch.chdir(trained)
    if ".onnx" in command:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnx")
    _, *arguments = shlex.split(command)
    threads = torch.get_num_threads()
    try:
        assert cli.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
