"""Lines are parsed strictly and at their limits; what JSON text a row holds, too."""

from __future__ import annotations

import re
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.parse import MAX_DEPTH, MAX_LINE_BYTES, check_parsed, parse_line, parse_nested
from luthier.data.reasons import RowError
from tests.builders import json_values, texts

_any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
rows = st.dictionaries(_any_text, json_values, max_size=4)


def reason(line: bytes) -> str:
    """Why the line is refused."""
    with pytest.raises(RowError) as caught:
        parse_line(line)
    return caught.value.reason


@given(rows)
def test_a_row_is_parsed_as_it_was_written(row: dict[str, Any]) -> None:
    assert parse_line(orjson.dumps(row)) == row
    assert parse_line(orjson.dumps(row, option=orjson.OPT_INDENT_2) + b"\r") == row


@given(rows)
def test_escapes_of_quotes_hide_no_key(row: dict[str, Any]) -> None:
    line = re.sub(rb"\\.", lambda found: b"\\u0022" if found[0] == b'\\"' else found[0], orjson.dumps(row))
    assert parse_line(line) == row


@given(rows.filter(bool), st.data())
def test_a_key_named_twice_is_found_wherever_it_stands(row: dict[str, Any], data: st.DataObject) -> None:
    key = orjson.dumps(data.draw(st.sampled_from(sorted(row)))) + b":1"
    line = orjson.dumps(row)
    assert reason(b"{" + key + b"," + line[1:]) == "duplicate_key"
    assert reason(b'{"x":[' + line[:-1] + b"," + key + b"}]}") == "duplicate_key"


@pytest.mark.parametrize(("levels", "is_good"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False)])
@pytest.mark.parametrize("padding", [0, 5000])
def test_depth_is_counted_exactly(levels: int, is_good: bool, padding: int) -> None:
    lists = levels - 1
    line = b'{"p":"%s","a":%s%s}' % (b"x" * padding, b"[" * lists, b"]" * lists)
    if is_good:
        assert parse_line(line)["p"] == "x" * padding
    else:
        assert reason(line) == "too_deep"


def test_length_is_counted_exactly() -> None:
    line = b'{"text":"' + b"a" * (MAX_LINE_BYTES - 11) + b'"}'
    assert len(line) == MAX_LINE_BYTES
    assert len(parse_line(line)["text"]) == MAX_LINE_BYTES - 11
    assert reason(line + b" ") == "line_too_long"


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"\xff"])
def test_the_mark_at_the_start_is_named_before_all_else(mark: bytes) -> None:
    assert reason(mark + b"{'a': NaN}") == ("bom" if len(mark) == 3 else "bad_utf8")


def test_messages_say_where_and_what() -> None:
    for line, words in (
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b'{"a": "\0"}', "NUL character at position 7"),
        (b"[]", "expected an object, found an array"),
        (b"1.5", "found a number"),
        (b'{"a":1,"a":2}', "the key `a` stands twice"),
        (b'{"a": NaN}', "found nan"),
    ):
        with pytest.raises(RowError, match=words):
            parse_line(line)


@given(json_values)
def test_nested_json_is_parsed_by_the_same_rules(value: Any) -> None:
    assert parse_nested(orjson.dumps(value).decode()) == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a":1,"a":2}]', "duplicate_key"),
        ('["\\u0000"]', "nul"),
        ('["\\ud800"]', "lone_surrogate"),
        ("[" * 40 + "]" * 40, "too_deep"),
        ("[NaN]", "non_finite_number"),
        ("[", "not_json"),
        ("", "not_json"),
    ],
)
def test_nested_json_is_refused_by_the_same_reasons(text: str, expected: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_nested(text)
    assert caught.value.reason == expected


def test_a_parsed_row_is_checked_for_depth() -> None:
    row: dict[str, Any] = {"a": 1}
    for _ in range(MAX_DEPTH - 1):
        row = {"a": row}
    check_parsed(row)
    with pytest.raises(RowError, match="nested deeper"):
        check_parsed({"a": row})


@given(texts)
def test_check_parsed_lets_any_text_pass(text: str) -> None:
    check_parsed({text: [text, {"a": text}]})
