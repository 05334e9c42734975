"""Find the line on which a key of a TOML or YAML file stands, so that errors can point at it."""

from __future__ import annotations

import re
from collections.abc import Iterator

_TABLE = re.compile(r"^\s*\[\[?\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"^\s*((?:[\w-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[\w-]+|\"[^\"]*\"|'[^']*'))*)\s*=")


def find_toml_lines(text: str) -> dict[str, int]:
    """Map each dotted key and table to its line. A reading for people: multi-line strings may add lines too many."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := _TABLE.match(line):
            table = _plain(match[1])
            lines.setdefault(table, number)
        elif match := _KEY.match(line):
            key = _plain(match[1])
            lines.setdefault(f"{table}.{key}" if table else key, number)
    return lines


def _plain(dotted: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in dotted.split("."))


def find_yaml_lines(text: str) -> dict[str, int]:
    """Map each dotted key of a YAML or JSON document to its line."""
    import yaml

    def walk(node: yaml.Node, path: str) -> Iterator[tuple[str, int]]:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            found = f"{path}.{key.value}" if path else str(key.value)
            yield found, key.start_mark.line + 1
            yield from walk(value, found)

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return {}  # JSON that is no YAML, as with tabs: errors then name keys without lines
    return dict(walk(root, "")) if root is not None else {}
