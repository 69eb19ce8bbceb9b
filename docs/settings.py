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
    """The comment behind each field; of a field that follows without one below a comment of its own, that."""
    found, above = {}, ""
    for line in inspect.getsource(owner).splitlines():
        if match := FIELD.match(line):
            found[match[1]] = match[2] or above
        elif line.strip().startswith("#"):
            above = line.strip().lstrip("# ")
            continue
        above = ""
    return found


def type_of(schema: dict, node: dict) -> str:
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    options = node.get("anyOf", node.get("oneOf"))
    if options:
        return " or ".join(type_of(schema, option) for option in options)
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if "const" in node:
        return f"`{node['const']}`"
    if node.get("type") == "array":
        items = node.get("prefixItems")
        if items:
            return f"[{', '.join(type_of(schema, item) for item in items)}]"
        return f"list of {type_of(schema, node['items'])}" if node.get("items") else "list"
    if node.get("type") == "object" and isinstance(node.get("additionalProperties"), dict):
        return f"mapping to {type_of(schema, node['additionalProperties'])}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {node[key]:g}" for key, sign in signs.items() if key in node]
    return " ".join([node.get("type", "any"), *bounds])


def reference() -> str:
    schema = TypeAdapter(config.Config).json_schema()
    owners = {name: owner for source in SOURCES for name, owner in vars(source).items() if inspect.isclass(owner)}
    lines = [HEADER]
    for name, node in {"Config": schema, **schema["$defs"]}.items():
        owner = owners[name]
        comments: dict[str, str] = {}
        for one in reversed(owner.__mro__):
            if one.__module__.startswith("tardkd"):
                comments |= meanings(one)
        lines += [f"## {name}", "", inspect.cleandoc(owner.__doc__ or "").replace("``", "`"), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, field in node["properties"].items():
            default = "required" if key in node.get("required", ()) else f"`{json.dumps(field.get('default'))}`"
            if isinstance(field.get("default"), dict):
                default = "its own"
            cells = key, type_of(schema, field), default, comments.get(key, "")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def undescribed() -> list[str]:
    """Keys without a meaning."""
    section, found = "", []
    for line in reference().splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| ") and line.endswith("|  |"):
            found.append(f"{section}.{line.split(' | ')[0][2:]}")
    return found


def main() -> None:
    Path(__file__).with_suffix(".md").write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
