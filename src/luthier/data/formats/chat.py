"""OpenAI's chat rows: `messages` of role and content, with tools, tool calls and per-message weights."""

from __future__ import annotations

import difflib
from typing import Any

import orjson

from luthier.data.example import MESSAGE_KEYS, Conversation, Example, Message
from luthier.data.formats.fields import read_content, read_list, read_tools, refuse_role
from luthier.data.parse import parse_nested
from luthier.data.reasons import RowError

NAME = "chat"
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_PLAIN = {"role", "content"}
_CLOSE_ENOUGH = 0.8
# Our key, and the keys people write it under.
_SPELLINGS = [(key, key) for key in ("reasoning_content", "tool_call_id", "name")]
_SPELLINGS += [("reasoning_content", "thinking"), ("reasoning_content", "reasoning")]


def matches(row: dict[str, Any]) -> bool:
    """Whether the row has `messages`."""
    return "messages" in row


def read(row: dict[str, Any]) -> Conversation:
    """The conversation, its messages reduced to the canonical keys."""
    return Conversation(read_messages(read_list(row, "messages")), read_tools(row) if "tools" in row else None)


def read_messages(raw: list[Any]) -> list[Message]:
    """Messages in canonical form."""
    return [
        message
        if type(message) is dict
        and len(message) == 2
        and message.get("role") in ("user", "assistant", "system")
        and type(message.get("content")) is str
        else _read_message(message, number)
        for number, message in enumerate(raw, 1)
    ]


def _read_message(raw: Any, number: int) -> Message:
    if not isinstance(raw, dict):
        raise RowError("wrong_type", f"message {number} must be an object, found {type(raw).__name__}")
    if "role" not in raw:
        raise RowError("missing_key", f"message {number} has no `role`")
    role = _ROLES.get(raw["role"]) if isinstance(raw["role"], str) else None
    if role is None:
        raise refuse_role(raw["role"], number)
    if raw.get("function_call"):
        raise RowError("bad_tool_call", f"message {number} uses `function_call`; write `tool_calls`")
    message: Message = {"role": role, "content": read_content(raw.get("content"), number)}
    if extras := raw.keys() - _PLAIN:
        _check_spelling(extras, number)
        _read_extras(raw, message, number)
    if message["content"] is None:
        # Beside a call OpenAI writes null; a template that prints the content would print `None`.
        message["content"] = ""
    return message


def _check_spelling(keys: set[str], number: int) -> None:
    """Other keys are somebody's notes and go their way, but `wieght` was meant to do something."""
    for key in sorted(keys - set(MESSAGE_KEYS)):
        if close := difflib.get_close_matches(key, MESSAGE_KEYS, 1, _CLOSE_ENOUGH):
            raise RowError("misspelt_key", f"message {number} has a key `{key}`; did you mean `{close[0]}`?")


def _read_extras(raw: dict[str, Any], message: Message, number: int) -> None:
    for key, theirs in _SPELLINGS:
        if (value := raw.get(theirs)) is not None:
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise RowError("wrong_type", f"message {number}: `{key}` must be text, found {type(value).__name__}")
            message[key] = str(value)
    if (weight := raw.get("weight")) is not None:
        if message["role"] != "assistant" or isinstance(weight, bool) or weight not in (0, 1):
            raise RowError(
                "bad_weight",
                f"message {number} ({message['role']}) has weight {weight!r}; only 0 or 1 on assistant turns",
            )
        if weight == 0:
            message["weight"] = 0
    if calls := raw.get("tool_calls"):
        if message["role"] != "assistant" or not isinstance(calls, list):
            raise RowError("bad_tool_call", f"message {number}: `tool_calls` must be a list on an assistant turn")
        message["tool_calls"] = [_read_call(call, number) for call in calls]


def _read_call(call: Any, number: int) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if isinstance(call, dict) and call.get("type", "function") != "function":
        raise RowError(
            "bad_tool_call", f"message {number}: a tool call of type {call['type']!r}; only functions are known"
        )
    if not isinstance(name, str) or not name:
        raise RowError("bad_tool_call", f"message {number}: a tool call needs `function.name`")
    arguments = function.get("arguments", {}) if isinstance(function, dict) else {}
    if isinstance(arguments, str):
        try:
            arguments = parse_nested(arguments or "{}")
        except RowError as error:
            if error.reason != "not_json":
                raise
            raise RowError("bad_tool_call", f"message {number}: the arguments of `{name}` are not JSON") from None
    if not isinstance(arguments, dict):
        raise RowError("bad_tool_call", f"message {number}: the arguments of `{name}` must be an object")
    canonical: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        canonical["id"] = str(call["id"])
    return canonical


def write(example: Example) -> dict[str, Any]:
    """The row as OpenAI's API takes it: arguments as a string of JSON."""
    if not isinstance(example, Conversation):
        raise RowError("wrong_kind", f"the chat format holds conversations, not a {example.kind}")
    row: dict[str, Any] = {"messages": write_messages(example.messages)}
    if example.tools:
        row["tools"] = example.tools
    return row


def write_messages(messages: list[Message]) -> list[Message]:
    """Canonical messages in OpenAI's spelling."""
    return [_write_message(message) if "tool_calls" in message else dict(message) for message in messages]


def _write_message(message: Message) -> Message:
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        text = orjson.dumps(function["arguments"]).decode()
        calls.append({**call, "function": {"name": function["name"], "arguments": text}})
    return {**message, "tool_calls": calls}
