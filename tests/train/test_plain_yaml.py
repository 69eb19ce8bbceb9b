"""What YAML can say with few characters is not read, checked or shown at length."""

from __future__ import annotations

import time

import pytest

from tardkd.train.config import ConfigError, load_config, parse_config
from tardkd.train.plain_yaml import LONGEST, MOST, PlainYamlError, read_yaml

from .recipe import recipe, tree

LISTS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10))
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100))
BOMBS = {
    "lists": (LISTS, f"more than {MOST} values"),
    "merges": (MERGES, f"more than {MOST} values"),
    "chain": (CHAIN, "more than 32 sections"),
    "itself": ("a: &a [*a]", "refers to itself"),
    "brackets": ("a: " + "[" * 5000, "more than 32 sections"),
    "braces": ("{a: " * 5000, "more than 32 sections"),
    "dashes": ("- " * 5000, "more than 32 sections"),
    "questions": ("? " * 5000, "more than 32 sections"),
    "lines": ("[\n" * 5000, "more than 32 sections"),
    "base 60": ("a: 1" + ":1" * 50_000, "a value has more than 4096 characters"),
    "long": ("a: " + "x" * LONGEST, f"more than {LONGEST} characters"),
}


@pytest.mark.parametrize("text, message", BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused_soon(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=f"{path} is not valid YAML: .*{message}"):
        load_config(path)
    if len(text) < LONGEST:  # that would not be a single argument of a command line
        with pytest.raises(ConfigError, match="override 'output=.*the value is not valid YAML"):
            recipe(tmp_path, f"output={text}")
    assert time.perf_counter() - began < 10


def test_of_many_problems_the_first_ones_are_told(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"key{i}: 1\n" for i in range(10_000)))
    began = time.perf_counter()
    with pytest.raises(ConfigError, match="and 9954 more such problems") as error:
        load_config(path)
    assert len(str(error.value).splitlines()) == 51 and time.perf_counter() - began < 10


def test_a_device_without_end_is_no_recipe():
    with pytest.raises(ConfigError, match=f"/dev/zero is not valid YAML: it has more than {LONGEST} characters"):
        load_config("/dev/zero")


def test_references_and_merges_are_still_read():
    text = "a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}\n"
    assert read_yaml(text) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 2}, "c": {"x": 1, "y": 3}}
    assert read_yaml("") is None and read_yaml("3") == 3
    with pytest.raises(PlainYamlError, match="key 'x' is given twice"):
        read_yaml("{x: 1, x: 2}")


def test_a_value_of_lists_of_lists_is_shown_in_short(tmp_path):
    """As a checkpoint could hold it, whose pickle can refer to one list many times, too."""
    value: list = ["x"] * 10
    for _ in range(20):
        value = [value] * 10
    began = time.perf_counter()
    with pytest.raises(ConfigError, match="recipe: output: ") as error:
        parse_config({**tree(tmp_path), "output": value}, source="recipe")
    assert len(str(error.value)) < 400 and time.perf_counter() - began < 10
