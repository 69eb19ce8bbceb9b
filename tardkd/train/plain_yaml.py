"""YAML as plain values: dicts, lists, texts and numbers, of a size that a recipe may have.

YAML can say much with few characters: lists of references to lists of references, or thousands of opening brackets.
What would take long to read, to check or to show is an error instead.
"""

from __future__ import annotations

from typing import Any

import yaml

LONGEST = 2**18  # characters of a text
LONGEST_VALUE = 2**12  # characters of one value, such as a path
DEEPEST = 32  # sections in one another
MOST = 50_000  # values, each counted as often as it is referred to


class PlainYamlError(ValueError):
    """A text that is not YAML, or says more than a recipe may."""


def read_yaml(text: str) -> Any:
    """The value that the text describes.

    Raises:
        PlainYamlError: it is not YAML, gives a key twice, or is too long, too deep or too large.
    """
    if len(text) > LONGEST:
        raise PlainYamlError(f"it has more than {LONGEST} characters")
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            _measure(root, {})
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except Exception as error:  # PyYAML lets out what its constructors meet in 2001-99-99 or "!!int ''"
        raise PlainYamlError(str(error) or type(error).__name__) from None


class _Loader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word; here the second one is an error."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > DEEPEST:
            raise PlainYamlError(f"it has more than {DEEPEST} sections in one another")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is given twice", node.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many values a node stands for, and how deep they go; `known` holds those of the nodes before."""
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise PlainYamlError("a value refers to itself")
        return found
    known[id(node)] = None
    if isinstance(node, yaml.ScalarNode):
        if len(node.value) > LONGEST_VALUE:
            raise PlainYamlError(f"a value has more than {LONGEST_VALUE} characters")
        children = []
    elif isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    else:
        children = node.value
    sizes = [_measure(child, known) for child in children]
    count, depth = 1 + sum(count for count, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
    if count > MOST:
        raise PlainYamlError(f"it stands for more than {MOST} values")
    if depth > DEEPEST:
        raise PlainYamlError(f"it has more than {DEEPEST} sections in one another")
    known[id(node)] = count, depth
    return count, depth
