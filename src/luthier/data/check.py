"""Check that an Example is a conversation that can be learnt from; raises RowError with the reason."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from luthier.data.example import Conversation, Example, Message, Preference, Text
from luthier.data.reasons import RowError


def check_example(example: Example) -> None:
    """Everything that can be known of a row without a model."""
    if type(example) is Conversation:
        check_messages(example.messages)
        if example.messages[-1]["role"] != "assistant":
            _refuse_ending(example.messages)
    elif type(example) is Preference:
        _check_preference(example)
    elif type(example) is Text and not example.text.strip():
        raise RowError("empty_content", "the text is empty")


def _refuse_ending(messages: list[Message]) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no_assistant", "no assistant turn, so nothing to learn")
    raise RowError("last_not_assistant", f"the last turn is `{messages[-1]['role']}`; expected assistant")


def _check_preference(pair: Preference) -> None:
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not answer:
            raise RowError("empty_content", f"`{name}` says nothing")
        check_messages([*pair.prompt, *answer])
        if answer[-1]["role"] != "assistant":
            raise RowError("last_not_assistant", f"`{name}` ends with `{answer[-1]['role']}`; expected assistant")
    if not any(message["role"] == "user" for message in pair.prompt):
        raise RowError("wrong_order", "the prompt has no user turn")
    if pair.chosen == pair.rejected:
        raise RowError("chosen_equals_rejected", "`chosen` and `rejected` are the same answer")


_FOLLOWS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def check_messages(messages: list[Message]) -> None:
    """Order of the roles, contents, and tool calls with their results."""
    if not messages:
        raise RowError("missing_key", "`messages` is empty")
    before = ""
    has_tools = False
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in _FOLLOWS[before]:
            expected = " or ".join(_FOLLOWS[before])
            after = f"after `{before}`" if before else "at the start"
            raise RowError("wrong_order", f"message {number} is `{role}` {after}; expected {expected}")
        content = message.get("content")
        if (not content or content.isspace()) and role != "tool" and not message.get("tool_calls"):
            raise RowError("empty_content", f"message {number} ({role}) says nothing")
        has_tools = has_tools or role == "tool" or "tool_calls" in message
        before = role
    if has_tools:
        _check_tool_calls(messages)


def _check_tool_calls(messages: list[Message]) -> None:
    waiting: list[Any] = []
    for number, message in enumerate(messages, 1):
        if message["role"] == "tool":
            _take_result(waiting, message, number)
        elif waiting:
            raise RowError(
                "unmatched_tool_call",
                f"message {number} comes before {len(waiting)} tool calls were answered",
            )
        else:
            waiting = [call.get("id") for call in message.get("tool_calls", ())]


def _take_result(waiting: list[Any], message: Message, number: int) -> None:
    if not waiting:
        raise RowError("unmatched_tool_call", f"message {number} is a tool result without a call before it")
    wanted = message.get("tool_call_id")
    if wanted is None or all(call is None for call in waiting):
        waiting.pop(0)
    elif wanted in waiting:
        waiting.remove(wanted)
    else:
        known = ", ".join(f"`{call}`" for call in waiting)
        raise RowError("unmatched_tool_call", f"message {number} answers `{wanted}`; the calls before it are {known}")


def check_json(example: Example) -> None:
    """Rows that came parsed may hold what JSON does not: decimals, bytes, dates, NaN; in a tool's arguments, say."""
    try:
        json.dumps(asdict(example), allow_nan=False)
    except TypeError as error:
        raise RowError("wrong_type", f"a value is not JSON: {error}") from None
    except ValueError:
        raise RowError("non_finite_number", "found NaN or Infinity; JSON has only finite numbers") from None
