"""ShareGPT rows: `conversations` of from and value (or role and content), with the role names people use."""

from __future__ import annotations

from typing import Any

import orjson

from luthier.data.example import Conversation, Example, Message
from luthier.data.formats.chat import read_messages
from luthier.data.formats.fields import find_text, read_json, read_list, read_tools, refuse_role
from luthier.data.reasons import RowError

NAME = "sharegpt"
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_WRITTEN = {"system": "system", "user": "human", "assistant": "gpt", "tool": "tool"}


def matches(row: dict[str, Any]) -> bool:
    """Whether the row has `conversations` or `conversation`."""
    return "conversations" in row or "conversation" in row


def read(row: dict[str, Any]) -> Conversation:
    """The conversation; a `system` beside it becomes its first message."""
    turns = read_list(row, "conversations" if "conversations" in row else "conversation")
    messages = [_read_turn(turn, number) for number, turn in enumerate(turns, 1)]
    if system := find_text(row, "system"):
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(read_messages(messages), read_tools(row))


def _read_turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise RowError("wrong_type", f"message {number} must be an object, found {type(turn).__name__}")
    who, said = ("from", "value") if "from" in turn else ("role", "content")
    if who not in turn:
        raise RowError("missing_key", f"message {number} has neither `from` nor `role`")
    name = turn[who]
    if not isinstance(name, str) or name not in _ROLES:
        raise refuse_role(name, number, tuple(_ROLES))
    if name == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": _read_calls(turn.get(said))}
    extras = {
        key: turn[key] for key in ("tool_calls", "tool_call_id", "name", "weight", "reasoning_content") if key in turn
    }
    return {"role": _ROLES[name], "content": turn.get(said), **extras}


def _read_calls(value: Any) -> list[Any]:
    calls = read_json(value, "value") if isinstance(value, str) else value
    return calls if isinstance(calls, list) else [calls]


def write(example: Example) -> dict[str, Any]:
    """Turns as from and value; what only a message of ours has goes along under its own key."""
    if not isinstance(example, Conversation):
        raise RowError("wrong_kind", f"the sharegpt format holds conversations, not a {example.kind}")
    row: dict[str, Any] = {"conversations": [_write_turn(message) for message in example.messages]}
    if example.tools:
        row["tools"] = orjson.dumps(example.tools).decode()
    return row


def _write_turn(message: Message) -> Message:
    extras = {key: value for key, value in message.items() if key not in ("role", "content")}
    return {"from": _WRITTEN[message["role"]], "value": message["content"], **extras}
