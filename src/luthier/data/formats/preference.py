"""Preference rows: `chosen` and `rejected` with or without a `prompt`, or OpenAI's preferred_output spelling."""

from __future__ import annotations

from typing import Any

from luthier.data.example import Example, Message, Preference
from luthier.data.formats.chat import read_messages, write_messages
from luthier.data.formats.fields import find_text, read_list, read_tools
from luthier.data.reasons import RowError

NAME = "preference"


def matches(row: dict[str, Any]) -> bool:
    """Whether the row holds two answers."""
    if "preferred_output" in row:
        return True
    # A table of mixed rows gives a conversation null answers; a pair without one is a bad pair.
    is_conversation = "messages" in row and (row.get("chosen") is None or row.get("rejected") is None)
    return "chosen" in row and "rejected" in row and not is_conversation


def read(row: dict[str, Any]) -> Preference:
    """Prompt and two answers, wherever the prompt stands."""
    if "preferred_output" in row:
        return _read_openai(row)
    prompt = _read_prompt(row)
    chosen, rejected = _read_answer(row, "chosen"), _read_answer(row, "rejected")
    if not prompt:
        prompt, chosen, rejected = _split_shared(chosen, rejected)
    elif _starts_with(chosen, prompt) and _starts_with(rejected, prompt):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if system := find_text(row, "system"):
        prompt = [{"role": "system", "content": system}, *prompt]
    return Preference(prompt, chosen, rejected, read_tools(row))


def _read_openai(row: dict[str, Any]) -> Preference:
    given = row.get("input")
    if not isinstance(given, dict):
        raise RowError("missing_key", "`input` must be an object with `messages`")
    answers = [read_messages(read_list(row, key)) for key in ("preferred_output", "non_preferred_output")]
    return Preference(read_messages(read_list(given, "messages")), answers[0], answers[1], read_tools(given))


def _read_prompt(row: dict[str, Any]) -> list[Message]:
    prompt = row.get("prompt", row.get("messages"))
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if prompt is None:
        return []
    if isinstance(prompt, list):
        return read_messages(prompt)
    raise RowError("wrong_type", f"`prompt` must be text or messages, found {type(prompt).__name__}")


def _read_answer(row: dict[str, Any], key: str) -> list[Message]:
    value = row.get(key)
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, list):
        return read_messages(value)
    raise RowError("wrong_type", f"`{key}` must be text or messages, found {type(value).__name__}")


def _starts_with(messages: list[Message], prompt: list[Message]) -> bool:
    return len(messages) > len(prompt) and messages[: len(prompt)] == prompt


def _split_shared(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Without a prompt of its own, it is what both conversations share, up to the last user turn in it."""
    shared = 0
    for left, right in zip(chosen, rejected, strict=False):
        if left != right:
            break
        shared += 1
    while shared and chosen[shared - 1]["role"] not in ("user", "tool"):
        shared -= 1
    if not shared:
        raise RowError("missing_key", "no `prompt`, and `chosen` and `rejected` share no user turn")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def write(example: Example) -> dict[str, Any]:
    """Prompt, chosen and rejected as lists of messages."""
    if not isinstance(example, Preference):
        raise RowError("wrong_kind", f"the preference format holds pairs, not a {example.kind}")
    row: dict[str, Any] = {
        "prompt": write_messages(example.prompt),
        "chosen": write_messages(example.chosen),
        "rejected": write_messages(example.rejected),
    }
    if example.tools:
        row["tools"] = example.tools
    return row
