"""The schema subset agrees with JSON Schema where it goes, and refuses what it does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import CallError, MissingPathError, UnsupportedError
from luthier.evals.schema import check_schema, is_valid, read_schema

ORDER = {
    "type": "object",
    "properties": {"item": {"type": "string", "minLength": 1}, "count": {"type": "integer", "minimum": 1}},
    "required": ["item", "count"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("schema", "value", "found"),
    [
        (ORDER, {"item": "lamp", "count": 2}, True),
        (ORDER, {"item": "lamp", "count": 2.0}, True),
        (ORDER, {"item": "lamp", "count": 2.5}, False),
        (ORDER, {"item": "lamp", "count": True}, False),
        (ORDER, {"item": "", "count": 2}, False),
        (ORDER, {"item": "lamp"}, False),
        (ORDER, {"item": "lamp", "count": 1, "more": 1}, False),
        (ORDER, [], False),
        ({"additionalProperties": {"type": "null"}}, {"a": None}, True),
        ({"additionalProperties": {"type": "null"}}, {"a": 1}, False),
        ({"type": ["string", "null"]}, None, True),
        ({"type": "number"}, True, False),
        ({"type": "boolean"}, 1, False),
        ({"enum": [1, "a"]}, True, False),
        ({"enum": [1, "a"]}, 1.0, True),
        ({"const": {"a": [0]}}, {"a": [False]}, False),
        ({"const": {"a": [0]}}, {"a": [0]}, True),
        ({"items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, [1, 2], True),
        ({"items": {"type": "integer"}}, [1, "2"], False),
        ({"maxItems": 1}, [1, 2], False),
        ({"maxItems": 1}, "long text", True),
        ({"pattern": "^a+$"}, "aa", True),
        ({"pattern": "^a+$"}, "b", False),
        ({"maxLength": 1}, "ab", False),
        ({"exclusiveMinimum": 0, "maximum": 1}, 0, False),
        ({"exclusiveMaximum": 1}, 1, False),
        ({"anyOf": [{"type": "string"}, {"minimum": 3}]}, 4, True),
        ({"oneOf": [{"minimum": 1}, {"minimum": 3}]}, 4, False),
        ({"allOf": [{"minimum": 1}, {"maximum": 3}]}, 4, False),
        ({"not": {"type": "string"}}, "a", False),
        ({"items": False}, [1], False),
        (True, 1, True),
        ({}, None, True),
    ],
)
def test_values_against_schemas(schema: Any, value: Any, found: bool) -> None:
    check_schema(schema)
    assert is_valid(value, schema) is found


@pytest.mark.parametrize(
    ("schema", "error", "said"),
    [
        ({"properties": {"a": {"format": "date"}}}, UnsupportedError, "`format` is not among the keywords"),
        ({"anyOf": [{"$ref": "#"}]}, UnsupportedError, "`\\$ref`"),
        ({"pattern": "("}, CallError, "no regular expression"),
        ({"type": "strnig"}, CallError, "no type `strnig`"),
        ([], CallError, "expected an object"),
    ],
)
def test_what_cannot_be_checked_is_refused(schema: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        check_schema(schema)


def test_a_schema_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "order.json"
    with pytest.raises(MissingPathError):
        read_schema(path)
    path.write_text("{")
    with pytest.raises(CallError, match="not JSON"):
        read_schema(path)
    path.write_text(json.dumps(ORDER))
    assert read_schema(path) == ORDER
