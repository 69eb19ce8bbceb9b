"""The documentation site: `python -m sphinx -W docs build/docs`, after `pip install ".[docs]"`.

Sphinx rather than MkDocs, because autodoc and napoleon read the docstrings as they are: Google style with roles such as
:func:`x`. The pages are Markdown (MyST), so that they can be read on a code host as well.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

HERE = Path(__file__).parent
ROOT = HERE.parent
REPOSITORY = "https://github.com/tardkd/tardkd/blob/main"

project = "tardkd"
author = "The tardkd developers"
copyright = author
release = version = metadata.version("tardkd")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"tardkd {release}"
exclude_patterns = ["images"]

# --- Markdown

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links such as settings.md#train, as code hosts understand them
# Doctor's report and other outputs are no language; shell blocks name theirs.
highlight_language = "text"

# --- Docstrings

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True  # (10.0, 10.0, 5.0, 5.0) and 1 / 9 as they were written
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100  # a longer signature has one argument a line
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has the types
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"

# A role that leads nowhere is an error. Types of signatures are links only where a page describes them.
nitpicky = True
nitpick_ignore_regex = [(r"py:(class|exc|obj)", r".*"), (r"py:func", r"epoch_batches|read_voc|voc_ap50|torch\..*")]


def field_comments(owner: type) -> dict[str, str]:
    """What stands in the comment behind (or above) each field of a dataclass, named tuple or pydantic model."""
    spec = importlib.util.spec_from_file_location("settings_page", HERE / "settings.py")
    settings_page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(settings_page)
    comments = settings_page.meanings(owner)
    return {name: comments[name] for name in owner.__annotations__ if comments.get(name)}


def add_field_comments(app: Sphinx, what: str, name: str, described: Any, options: Any, lines: list[str]) -> None:
    """Show the comments behind a class's fields, which autodoc does not read, as the section of its attributes."""
    fields = dataclasses.is_dataclass(described) or hasattr(described, "_fields")
    if what != "class" or not fields or "Attributes:" in lines:
        return
    comments = field_comments(described)
    if comments:
        lines += ["", "Attributes:", *(f"    {field}: {comment}" for field, comment in comments.items()), ""]


def lead_out(text: str, folder: Path, page: Path) -> str:
    """``text`` of a file in ``folder``, shown on ``page``: links to what is not on the site go to the repository."""

    def link(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / match[1]))
        if target.is_relative_to(HERE):
            return f"]({os.path.relpath(target, page.parent)}"
        return f"]({REPOSITORY}/{target.relative_to(ROOT)}"

    return re.sub(r"\]\((?![a-z]+:|#|[^)]*\.png)([^)#\s]+)", link, text)


def read_page(app: Sphinx, name: str, content: list[str]) -> None:
    page = HERE / f"{name}.md"
    content[0] = lead_out(content[0], page.parent, page)


def read_included(app: Sphinx, relative: Path, parent: str, content: list[str]) -> None:
    folder = Path(os.path.normpath(HERE / relative)).parent
    content[0] = lead_out(content[0], folder, HERE / f"{parent}.md")


def setup(app: Sphinx) -> None:
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
    app.connect("autodoc-process-docstring", add_field_comments, priority=100)  # before napoleon
