"""Prompt and completion rows: two texts, or two lists of messages."""

from __future__ import annotations

from typing import Any

from luthier.data.example import Conversation, Example
from luthier.data.formats.chat import read_messages
from luthier.data.formats.fields import check_pairs, find_text, read_text, read_tools, turns_of
from luthier.data.reasons import RowError

NAME = "completion"


def matches(row: dict[str, Any]) -> bool:
    """Whether the row has a `prompt` and a `completion`."""
    return "prompt" in row and "completion" in row


def read(row: dict[str, Any]) -> Conversation:
    """The prompt as the user's turn (or turns), the completion as the assistant's."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        # An assistant turn in the prompt is an example shown to the model, not an answer to learn.
        shown = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in read_messages(prompt)]
        messages = [*shown, *read_messages(completion)]
    else:
        messages = [
            {"role": "user", "content": read_text(row, "prompt")},
            {"role": "assistant", "content": read_text(row, "completion")},
        ]
    if system := find_text(row, "system"):
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(messages, read_tools(row))


def write(example: Example) -> dict[str, Any]:
    """One question and one answer; anything longer has no place here."""
    if not isinstance(example, Conversation) or example.tools:
        raise RowError("wrong_kind", "the completion format holds one question and its answer")
    system, turns = turns_of(example.messages, NAME)
    check_pairs(turns, NAME)
    if len(turns) != 2:
        raise RowError("wrong_kind", f"the completion format holds one answer, found {len(turns) // 2}")
    row = {"prompt": turns[0]["content"], "completion": turns[1]["content"]}
    return {**row, "system": system} if system else row
