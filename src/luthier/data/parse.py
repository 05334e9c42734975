"""Parse one line into an object, strictly: what JSON allows but no training row should hold is refused by name."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import orjson

from luthier.data.reasons import RowError

MAX_LINE_BYTES = 8 << 20
MAX_DEPTH = 32
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


def parse_line(line: bytes) -> dict[str, Any]:
    """The row as an object; raises RowError with the exact reason."""
    if len(line) > MAX_LINE_BYTES:
        raise RowError("line_too_long", f"a line of {len(line):,} bytes; the most is {MAX_LINE_BYTES:,}")
    row = _loaded(line)
    if type(row) is not dict:
        raise RowError("not_an_object", f"expected an object, found {_json_name(row)}")
    _check_loaded(line, row)
    return row


def parse_nested(text: str) -> Any:
    """JSON that a row keeps as text (arguments of a tool call, a column of a CSV), by the same rules."""
    line = text.encode()
    value = _loaded(line)
    _check_loaded(line, value)
    _check_integers(line)
    return value


def check_parsed(row: dict[str, Any]) -> None:
    """The same for a row that came parsed, as from CSV and parquet."""
    _check_depth(row)
    _refuse_nul(row)


def _loaded(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except ValueError as error:
        _refuse(line, error)


def _check_loaded(line: bytes, value: Any) -> None:
    if line.count(b"{") + line.count(b"[") > MAX_DEPTH:
        _check_depth(value)
    if b"tool" in line or b"arguments" in line:
        _check_integers(line)
    if b"\\u" in line and b"\\u0000" in line:
        _refuse_nul(value)
    _check_keys(line, value)


_LONG_NUMBER = re.compile(rb"[:\[,\s]-?\d{19,}[\s,\]}]")


def _check_integers(line: bytes) -> None:
    """Refuse a whole number that 64 bits cannot hold: the parser would round it, and a call would mean another."""
    if _LONG_NUMBER.search(line):
        for leaf in _leaves(json.loads(line)):
            if isinstance(leaf, int) and abs(leaf) >= 2**63:
                raise RowError("non_finite_number", f"{leaf} is larger than 64 bits hold; write it as text")


def _refuse(line: bytes, error: ValueError) -> NoReturn:
    """Say why, in the order in which a person would want to know."""
    if line.startswith(b"\xef\xbb\xbf"):
        raise RowError("bom", "starts with a byte order mark; save the file as UTF-8 without one") from None
    try:
        text = line.decode()
    except UnicodeDecodeError as bad:
        raise RowError("bad_utf8", f"byte {bad.start} is not UTF-8 ({bad.reason})") from None
    if "\x00" in text:
        raise RowError("nul", f"NUL character at position {text.index(chr(0))}") from None
    try:
        row = json.loads(text)
    except RecursionError:
        raise RowError("too_deep", f"nested deeper than {MAX_DEPTH}") from None
    except ValueError:
        raise RowError(_name_of(error), f"not JSON: {_plain(error)}") from None
    if _depth(row) > MAX_DEPTH:
        raise RowError("too_deep", f"nested deeper than {MAX_DEPTH}") from None
    for value in _leaves(row):
        if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
            raise RowError("non_finite_number", f"found {value}; JSON has only finite numbers") from None
        if isinstance(value, str) and _LONE_SURROGATE.search(value):
            raise RowError("lone_surrogate", "half of a surrogate pair, which no text can hold") from None
    raise RowError(_name_of(error), f"not JSON: {_plain(error)}") from None


def _name_of(error: ValueError) -> str:
    return "non_finite_number" if "infinity" in str(error) else "not_json"


def _plain(error: ValueError) -> str:
    return str(error).partition(": line ")[0]


def _json_name(value: object) -> str:
    names = {list: "an array", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _refuse_nul(row: object) -> None:
    if any("\x00" in value for value in _leaves(row) if isinstance(value, str)):
        raise RowError("nul", "NUL character in a text")


def _leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in (key, *_leaves(inner))]
    if isinstance(value, list):
        return [leaf for inner in value for leaf in _leaves(inner)]
    return [value]


def _depth(value: object, level: int = 1) -> int:
    """Levels of nesting, counted no further than the limit."""
    if level > MAX_DEPTH + 1 or not isinstance(value, dict | list) or not value:
        return level
    inner = value.values() if isinstance(value, dict) else value
    return max(_depth(item, level + 1) if isinstance(item, dict | list) else level for item in inner)


def _check_depth(row: object) -> None:
    if _depth(row) > MAX_DEPTH:
        raise RowError("too_deep", f"nested deeper than {MAX_DEPTH}")


def _check_keys(line: bytes, row: Any) -> None:
    """Refuse a key named twice: the parser keeps the last, and a second `role` could smuggle anything.

    Writing the row out again gives as many quotes as the line had unless a key was lost, so counting finds what a
    parser hook finds at a tenth of its cost; a line that escapes its quotes as \\u0022 is looked at by the hook.
    """
    if b"\\u0022" not in line and line.count(b'"') == orjson.dumps(row).count(b'"'):
        return
    json.loads(line, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RowError("duplicate_key", f"the key `{key[:80]}` stands twice in one object")
        found[key] = value
    return found
