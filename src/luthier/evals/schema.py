"""The part of JSON Schema by which answers are checked; a keyword outside of it is refused by name, never ignored."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson

from luthier.errors import CallError, MissingPathError, UnsupportedError

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "null": type(None),
}
_TOLD_ONLY = {"$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated"}
_DEEPEST = 64


def read_schema(path: Path) -> dict[str, Any]:
    """A schema of a file, checked; raises CallError or UnsupportedError."""
    if not path.is_file():
        raise MissingPathError(f"no JSON schema at {path}", hint="--json-schema names a file")
    try:
        schema = orjson.loads(path.read_bytes())
    except ValueError as error:
        raise CallError(f"{path}: not JSON: {error}") from None
    check_schema(schema, str(path))
    assert isinstance(schema, dict)
    return schema


def check_schema(schema: Any, where: str = "schema", depth: int = 0) -> None:
    """Refuse what could not be checked."""
    if isinstance(schema, bool):
        schema = {}
    if not isinstance(schema, dict) or depth > _DEEPEST:
        raise CallError(f"{where}: expected an object that is a schema")
    if unknown := sorted(schema.keys() - _CHECKS.keys() - _TOLD_ONLY):
        raise UnsupportedError(
            f"{where}: `{unknown[0]}` is not among the keywords that are checked",
            hint=f"these are: {', '.join(sorted(_CHECKS))}",
        )
    try:
        re.compile(schema.get("pattern", ""))
    except (re.error, TypeError) as error:
        raise CallError(f"{where}: `pattern` is no regular expression: {error}") from None
    named = schema.get("type", [])
    if unknown := [each for each in (named if isinstance(named, list) else [named]) if each not in _TYPES]:
        raise CallError(f"{where}: no type `{unknown[0]}`", hint=f"there are: {', '.join(_TYPES)}")
    for inner in _parts_of(schema):
        check_schema(inner, where, depth + 1)


def _parts_of(schema: Mapping[str, Any]) -> list[Any]:
    found = [*schema.get("properties", {}).values()]
    found += [schema[key] for key in ("items", "additionalProperties", "not") if key in schema]
    for key in ("anyOf", "allOf", "oneOf"):
        found += schema.get(key, [])
    return found


def is_valid(value: Any, schema: Any) -> bool:
    """Whether a value is as its schema says."""
    if isinstance(schema, bool):
        return schema
    return all(_CHECKS[key](value, wanted, schema) for key, wanted in schema.items() if key in _CHECKS)


def _is_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[name])


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON: true is not 1, and 1 is 1.0."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _extra(value: Any, wanted: Any, schema: Mapping[str, Any]) -> bool:
    if not isinstance(value, dict):
        return True
    return all(is_valid(value[key], wanted) for key in value.keys() - schema.get("properties", {}).keys())


_CHECKS: dict[str, Callable[[Any, Any, Mapping[str, Any]], bool]] = {
    "type": lambda v, w, _: any(_is_type(v, each) for each in (w if isinstance(w, list) else [w])),
    "enum": lambda v, w, _: any(_same(v, each) for each in w),
    "const": lambda v, w, _: _same(v, w),
    "properties": lambda v, w, _: (
        not isinstance(v, dict) or all(is_valid(v[key], each) for key, each in w.items() if key in v)
    ),
    "required": lambda v, w, _: not isinstance(v, dict) or all(key in v for key in w),
    "additionalProperties": _extra,
    "items": lambda v, w, _: not isinstance(v, list) or all(is_valid(each, w) for each in v),
    "minItems": lambda v, w, _: not isinstance(v, list) or len(v) >= w,
    "maxItems": lambda v, w, _: not isinstance(v, list) or len(v) <= w,
    "minLength": lambda v, w, _: not isinstance(v, str) or len(v) >= w,
    "maxLength": lambda v, w, _: not isinstance(v, str) or len(v) <= w,
    "pattern": lambda v, w, _: not isinstance(v, str) or re.search(w, v) is not None,
    "minimum": lambda v, w, _: not _is_number(v) or v >= w,
    "maximum": lambda v, w, _: not _is_number(v) or v <= w,
    "exclusiveMinimum": lambda v, w, _: not _is_number(v) or v > w,
    "exclusiveMaximum": lambda v, w, _: not _is_number(v) or v < w,
    "anyOf": lambda v, w, _: any(is_valid(v, each) for each in w),
    "allOf": lambda v, w, _: all(is_valid(v, each) for each in w),
    "oneOf": lambda v, w, _: sum(is_valid(v, each) for each in w) == 1,
    "not": lambda v, w, _: not is_valid(v, w),
}
