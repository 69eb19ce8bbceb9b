"""What the documentation says can be done."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from tardkd import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.md"), *ROOT.glob("benchmarks/**/*.md")]
)


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def commands() -> list[str]:
    """Every ``tardkd ...`` line of the pages' plain code blocks."""
    found = []
    for page in PAGES:
        block = None  # the language of the one that a line is in
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith("```"):
                block = line[3:] if block is None else None
            elif block == "" and (match := re.search(r"^(?:.*(?:-m|&&) )?tardkd (\w[^#]*)", line)):
                found.append(match[1].strip())
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command):
    cli._parse(shlex.split(command))


@pytest.mark.parametrize(
    "config", sorted({word for command in commands() for word in command.split() if word.startswith("recipes/")})
)
def test_recipes_that_are_named_are_there(config):
    assert (ROOT / config).exists()
