"""Strategies and small builders that many tests share: texts, conversations, preference pairs, files of rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
from hypothesis import strategies as st

from luthier.data.example import Conversation, Example, Message, Preference, Text

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40).filter(
    str.strip
)
_words = st.from_regex(r"[a-z][a-z_]{0,7}", fullmatch=True)
_leaves = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    _leaves | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=3),
    max_leaves=5,
)
arguments = st.dictionaries(_words, json_values, max_size=3)
tools = st.lists(
    st.builds(
        lambda name, says: {
            "type": "function",
            "function": {"name": name, "description": says, "parameters": {"type": "object", "properties": {}}},
        },
        _words,
        texts,
    ),
    min_size=1,
    max_size=2,
)


def turn(role: str, content: str | None, **extras: Any) -> Message:
    """One message in canonical form."""
    return {"role": role, "content": content, **extras}


def call(name: str, arguments: dict[str, Any], id: str | None = None) -> dict[str, Any]:
    """One tool call in canonical form."""
    made = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return made if id is None else {**made, "id": id}


@st.composite
def _answers(draw: st.DrawFn, rich: bool) -> list[Message]:
    """What stands between two user turns: an answer, perhaps after calls of tools and their results."""
    messages: list[Message] = []
    if rich and draw(st.booleans()):
        with_ids = draw(st.booleans())
        names = draw(st.lists(_words, min_size=1, max_size=2))
        ids = [f"call_{index}" for index in range(len(names))]
        calls = [call(name, draw(arguments), id if with_ids else None) for name, id in zip(names, ids, strict=True)]
        messages.append(turn("assistant", draw(st.just("") | texts), tool_calls=calls))
        for id in draw(st.permutations(ids)):
            result = turn("tool", draw(st.just("") | texts))
            messages.append({**result, "tool_call_id": id} if with_ids else result)
    extras: dict[str, Any] = {}
    if rich and draw(st.booleans()):
        extras["weight"] = 0
    if rich and draw(st.booleans()):
        extras["reasoning_content"] = draw(texts)
    return [*messages, turn("assistant", draw(texts), **extras)]


@st.composite
def conversations(draw: st.DrawFn, *, rich: bool = True, max_turns: int = 3) -> Conversation:
    """A conversation that passes every check; `rich` ones have tools, calls, weights and thinking."""
    messages = [turn("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, max_turns))):
        messages.append(turn("user", draw(texts)))
        messages += draw(_answers(rich))
    return Conversation(messages, draw(st.none() | tools) if rich else None)


@st.composite
def preferences(draw: st.DrawFn) -> Preference:
    """A pair whose two answers differ from their first character on."""
    prompt = draw(conversations(rich=False, max_turns=2)).messages[:-1]
    chosen, rejected = draw(_answers(True)), draw(_answers(True))
    for answer, mark in ((chosen, "+"), (rejected, "-")):
        answer[0]["content"] = mark + (answer[0]["content"] or "")
    return Preference(prompt, chosen, rejected, draw(st.none() | tools))


examples: st.SearchStrategy[Example] = (
    conversations() | conversations(rich=False) | preferences() | st.builds(Text, texts)
)


def chat_row(user: str = "hello", assistant: str = "hi") -> dict[str, Any]:
    """The smallest chat row."""
    return {"messages": [turn("user", user), turn("assistant", assistant)]}


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """A file of one JSON row a line."""
    path.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
    return path
