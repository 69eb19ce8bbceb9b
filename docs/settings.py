"""Writes docs/settings.md from the code: names, types and defaults from the schema, meanings from the comments.

python docs/settings.py
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

from pydantic import TypeAdapter

from tardkd.distill import settings as distill
from tardkd.train import config, models

SOURCES = (config, models, distill)
FIELD = re.compile(r"^    (\w+): [^#\n]*?(?:  # (.+))?$", re.MULTILINE)
HEADER = """# Settings

What a recipe may hold. A key may be overridden on the command line by its path, such as `optimizer.lr=0.01`. Generated
from the code by `python docs/settings.py`.
"""


def meanings(owner: type) -> dict[str, str]:
    """The comment behind each field of the class; of a field without one, the comment on the line above it."""
    comments, above = {}, ""
    for line in inspect.getsource(owner).splitlines():
        if match := FIELD.match(line):
            comments[match[1]] = match[2] or above
        elif line.strip().startswith("#"):
            above = line.strip().lstrip("# ")
            continue
        above = ""
    return comments


def type_of(schema: dict, node: dict) -> str:
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    options = node.get("anyOf", node.get("oneOf"))
    if options:
        return " or ".join(type_of(schema, option) for option in options)
    if "enum" in node:
        return " or ".join(f"`{value}`" for value in node["enum"])
    if "const" in node:
        return f"`{node['const']}`"
    if node.get("type") == "array":
        items = node.get("prefixItems")
        if items:
            return f"[{', '.join(type_of(schema, item) for item in items)}]"
        return f"list of {type_of(schema, node['items'])}" if node.get("items") else "list"
    if node.get("type") == "object" and isinstance(node.get("additionalProperties"), dict):
        return f"mapping to {type_of(schema, node['additionalProperties'])}"
    return " ".join([node.get("type", "any"), *bounds_of(node)])


def bounds_of(node: dict) -> list[str]:
    """The interval of a number, as in "≥ 0" and "< 1"."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return [f"{sign} {node[key]:g}" for key, sign in signs.items() if key in node]


def default_of(key: str, field: dict, required: list[str]) -> str:
    """What holds where a recipe does not say it. A section without a default of its own has those of its keys."""
    if key in required:
        return "required"
    default = field.get("default")
    is_nullable = any(option.get("type") == "null" for option in field.get("anyOf", ()))
    if isinstance(default, dict) or (default is None and not is_nullable):
        return "its own"
    return f"`{json.dumps(default)}`"


def reference() -> str:
    schema = TypeAdapter(config.Config).json_schema()
    owners = {name: owner for source in SOURCES for name, owner in vars(source).items() if inspect.isclass(owner)}
    lines = [HEADER]
    for name, node in {"Config": schema, **schema["$defs"]}.items():
        owner = owners[name]
        comments: dict[str, str] = {}
        for base in reversed(owner.__mro__):
            if base.__module__.startswith("tardkd"):
                comments |= meanings(base)
        lines += [f"## {name}", "", inspect.cleandoc(owner.__doc__ or "").replace("``", "`"), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, field in node["properties"].items():
            cells = (
                key,
                type_of(schema, field),
                default_of(key, field, node.get("required", [])),
                comments.get(key, ""),
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def undescribed() -> list[str]:
    """The keys of which no comment says what they mean."""
    section, keys = "", []
    for line in reference().splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| ") and line.endswith("|  |"):
            keys.append(f"{section}.{line.split(' | ')[0][2:]}")
    return keys


def main() -> None:
    Path(__file__).with_suffix(".md").write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
