"""Every hostile line gets exactly its reason, and no accepted line is changed on the way."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.example import Conversation
from luthier.data.reasons import REASON_NAMES, REASONS
from luthier.data.rows import ReadOptions, RowBatch, RowReader
from luthier.data.source import Block
from luthier.spec.data import Data
from tests.unit.data.hostile import HARMLESS, HOSTILE, chat

# Reasons that one line cannot cause by itself, or not without a model, or only where scores are read.
_ELSEWHERE = {
    *("wrong_columns", "wrong_kind", "control_token", "template_refused"),
    *("score_off_scale", "chosen_scores_lower"),
}

READER = RowReader(ReadOptions(Data()), ("rows.jsonl",))


def read(*lines: bytes, reader: RowReader = READER) -> RowBatch:
    """The lines as one block."""
    return reader.read(Block(0, list(range(1, len(lines) + 1)), list(lines), 0))


def kept_bytes(entry: dict[str, Any]) -> bytes:
    """The row as rejected.jsonl keeps it."""
    return entry["row"].encode() if "row" in entry else base64.b64decode(entry["row_base64"])


def test_the_corpus_is_whole() -> None:
    assert len(HOSTILE) == 176
    assert len(HARMLESS) == 27
    assert len({name for name, _, _ in HOSTILE}) == len(HOSTILE)
    malformed = {reason.name for reason in REASONS.values() if reason.is_malformed}
    assert {reason for _, _, reason in HOSTILE} == malformed - _ELSEWHERE


@pytest.mark.parametrize(("name", "line", "reason"), HOSTILE, ids=[name for name, _, _ in HOSTILE])
def test_hostile_line_gets_its_reason_and_is_kept(name: str, line: bytes, reason: str) -> None:
    batch = read(line)
    assert [REASON_NAMES.get(code, "accepted") for code in batch.reasons] == [reason]
    (entry,) = batch.rejected
    assert (entry["file"], entry["line"], entry["reason"]) == ("rows.jsonl", 1, reason)
    assert entry["message"]
    assert len(entry["message"]) < 400
    assert kept_bytes(entry) == line


@pytest.mark.parametrize(("name", "line", "contents"), HARMLESS, ids=[name for name, _, _ in HARMLESS])
def test_harmless_line_is_read_as_it_stands(name: str, line: bytes, contents: list[str]) -> None:
    example = READER.example(line)
    assert isinstance(example, Conversation)
    assert [message["content"] for message in example.messages] == contents


def test_a_bad_line_does_not_touch_its_neighbours() -> None:
    lines = [line for _, bad, _ in HOSTILE for line in (bad, chat())]
    batch = read(*lines)
    assert (batch.reasons[1::2] == 0).all()
    assert (batch.reasons[::2] > 0).all()
    assert [entry["line"] for entry in batch.rejected] == list(range(1, len(lines), 2))
    assert len(set(batch.contents[1::2])) == 1


def test_a_row_of_another_kind_is_refused_by_objective() -> None:
    reader = RowReader(ReadOptions(Data(), objective="sft"), ("rows.jsonl",))
    assert [entry["reason"] for entry in read(b'{"text": "a"}', reader=reader).rejected] == ["wrong_kind"]


def test_a_row_without_its_group_is_refused() -> None:
    reader = RowReader(ReadOptions(Data(group_by="user")), ("rows.jsonl",))
    batch = read(chat(beside=',"user":[1]'), chat(), chat(beside=',"user":[1]'), reader=reader)
    assert batch.reasons.tolist()[::2] == [0, 0]
    assert [entry["reason"] for entry in batch.rejected] == ["missing_key"]
    assert batch.groups[0] == batch.groups[2]


def test_a_nul_in_a_parsed_row_is_found() -> None:
    batch = READER.read(Block(0, [1, 2], [{"text": "a\0b"}, {"text": "a", "meta": [{"b": "\0"}]}], 0))
    assert [entry["reason"] for entry in batch.rejected] == ["nul", "nul"]


def test_a_group_of_any_type_is_hashed() -> None:
    reader = RowReader(ReadOptions(Data(group_by="user")), ("rows.parquet",))
    batch = reader.read(Block(0, [1, 2], [{"text": "a", "user": b"\xff"}, {"text": "b", "user": b"\xff"}], 0))
    assert batch.groups[0] == batch.groups[1] > 0


@given(st.binary(max_size=60))
def test_no_bytes_crash_the_reader(line: bytes) -> None:
    batch = read(line)
    assert len(batch.reasons) == 1
    assert all(kept_bytes(entry) == line for entry in batch.rejected)


@given(st.data())
def test_no_damage_to_a_good_line_crashes_the_reader(data: st.DataObject) -> None:
    line = bytearray(chat(beside=',"tools":[{"type":"function"}]'))
    for _ in range(data.draw(st.integers(1, 4))):
        line[data.draw(st.integers(0, len(line) - 1))] = data.draw(st.integers(0, 255))
    assert len(read(bytes(line)).reasons) == 1
