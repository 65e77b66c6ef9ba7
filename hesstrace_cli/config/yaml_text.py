"""YAML as settings are written in it: plain values, lists and mappings, each key once.

What other YAML can do is refused: tags that make objects, text that a tag cannot read, aliases
that grow into more than was written, and what is nested without end.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
MOST_CHARACTERS = 1 << 20
_MOST_NODES = 10_000  # with every alias written out
_TOO_MANY = f"it holds more than {_MOST_NODES} values, aliases written out"
_MOST_LEVELS = 30
_LONGEST_TEXT = 300  # of a value in an error
_LONGEST_NUMBER = 400  # digits; Python refuses to print far longer ones


def load_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: In one line, if it is not such a document.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it is {len(text)} characters long, expected at most {MOST_CHARACTERS}")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as problem:
        raise ValueError(" ".join(str(problem).split())) from problem


class _Loader(yaml.SafeLoader):
    """Reads plain values alone, none of which a small text can blow up."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own
        first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in _PLAIN
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._level = 0
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node and those in it: not too deep, and not so many that reading them takes long."""
        self._level += 1
        self._nodes += 1
        if self._level > _MOST_LEVELS:
            raise ValueError(f"it is nested more than {_MOST_LEVELS} levels deep")
        if self._nodes > _MOST_NODES:
            raise ValueError(_TOO_MANY)
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def compose_document(self) -> yaml.Node | None:
        """The whole document, its aliases counted as what they stand for."""
        node = super().compose_document()
        if node is not None and _count(node, {}) > _MOST_NODES:
            raise ValueError(_TOO_MANY)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value, whose tag must be one that its text would be given anyway, or a text's."""
        if isinstance(node, yaml.ScalarNode) and node.tag != _TAG + "str":
            own = self.resolve(yaml.ScalarNode, node.value, (True, False))
            fits = own == node.tag or (node.tag, own) == (_TAG + "float", _TAG + "int")
            if node.tag in self.yaml_constructors and not fits:
                kind = node.tag.removeprefix(_TAG)
                raise ValueError(f"{node.value[:80]!r} is marked as {kind}, which it is not")
            if len(node.value) > _LONGEST_NUMBER:
                raise ValueError(f"it holds a number of {len(node.value)} digits")
        return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, its keys counted: YAML's own loader takes the last of two."""
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        keys = [self.construct_object(key, deep=True) for key, _ in pairs]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise ValueError(f"key {str(twice[0])[:80]!r} is there twice")
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-3 for a text.
_Loader.add_implicit_resolver(
    _TAG + "float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """The values in a node, with every alias written out.

    Args:
        node: Where to begin.
        known: By the node's id; 0 while it is being counted.

    Raises:
        ValueError: If a node is within itself.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if known.get(id(node)) == 0:
        raise ValueError("a value is within itself, through an alias")
    if id(node) not in known:
        known[id(node)] = 0
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(node)]


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 200, 200

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002
        """Python itself refuses to write a very long one."""
        return repr(x) if x.bit_length() < 200 else f"a number of {x.bit_length()} bits"


def shortened(value: Any) -> str:
    """The value as Python writes it, cut where it is long."""
    text = _Short().repr(value)
    return text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 4] + " ..."
