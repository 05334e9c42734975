"""Alpaca rows: `instruction`, `input`, `output`, with `system` and `history` where a dataset has them."""

from __future__ import annotations

from typing import Any

from luthier.data.example import Conversation, Example, Message
from luthier.data.formats.fields import check_pairs, find_text, read_list, read_text, read_tools, turns_of
from luthier.data.reasons import RowError

NAME = "alpaca"


def matches(row: dict[str, Any]) -> bool:
    """Whether the row has an `instruction`."""
    return "instruction" in row


def read(row: dict[str, Any]) -> Conversation:
    """History first, then the instruction with its input below it, and the output as the answer."""
    messages: list[Message] = []
    if system := find_text(row, "system"):
        messages.append({"role": "system", "content": system})
    for number, pair in enumerate(read_list(row, "history") if row.get("history") else [], 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError("wrong_type", f"`history` item {number} must be a pair of texts")
        messages += _turn(*pair)
    parts = [read_text(row, "instruction"), find_text(row, "input")]
    messages += _turn("\n\n".join(part for part in parts if part), read_text(row, "output"))
    return Conversation(messages, read_tools(row))


def _turn(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def write(example: Example) -> dict[str, Any]:
    """The last pair as instruction and output, those before it as history."""
    if not isinstance(example, Conversation) or example.tools:
        raise RowError("wrong_kind", "the alpaca format holds conversations without tools")
    system, turns = turns_of(example.messages, NAME)
    check_pairs(turns, NAME)
    texts = [turn["content"] for turn in turns]
    row: dict[str, Any] = {"instruction": texts[-2], "input": "", "output": texts[-1]}
    if system:
        row["system"] = system
    if len(texts) > 2:
        row["history"] = [list(pair) for pair in zip(texts[:-2:2], texts[1:-2:2], strict=True)]
    return row
