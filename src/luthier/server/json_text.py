"""JSON from strangers, read strictly, and JSON for clients, written fast."""

from __future__ import annotations

import json
from typing import Any

import orjson

from luthier.server.problems import problem

MOST_DEPTH = 32
_MOST_INT = 2**63


def read_json(body: bytes) -> Any:
    """A JSON document; refuses NaN, halves of surrogate pairs, keys that stand twice, NUL and deep nesting."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise problem(400, f"the body is not JSON: {error}", hint="send one JSON object, as UTF-8") from None
    _check(found)
    _check_unique(body)
    return found


def _check(document: Any) -> None:
    """Walk without recursion, which a hostile document could exhaust."""
    left: list[tuple[Any, int]] = [(document, 1)]
    while left:
        value, depth = left.pop()
        if depth > MOST_DEPTH:
            raise problem(400, f"the body is nested more than {MOST_DEPTH} deep")
        if isinstance(value, str):
            if "\0" in value:
                raise problem(400, "the body has a NUL character in a text")
        elif isinstance(value, dict):
            left += [(key, depth) for key in value]
            left += [(each, depth + 1) for each in value.values()]
        elif isinstance(value, list):
            left += [(each, depth + 1) for each in value]
        elif isinstance(value, int) and not -_MOST_INT <= value < _MOST_INT:
            raise problem(400, "the body has a number that 64 bits do not hold")


def _check_unique(body: bytes) -> None:
    """Two readers of one document must not see two values under one key."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise problem(400, f"the key {twice[:64]!r} stands twice in the body")
        return found

    json.loads(body, object_pairs_hook=unique)


def render_json(value: Any) -> bytes:
    """A JSON document for a client; numbers that JSON does not know become null."""
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY)
