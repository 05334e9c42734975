"""Read typed fields out of a row, with the reason when they are not there."""

from __future__ import annotations

import difflib
from typing import Any

from luthier.data.example import ROLES, Message
from luthier.data.parse import parse_nested
from luthier.data.reasons import RowError


def read_text(row: dict[str, Any], key: str) -> str:
    """The text under a key that must be there."""
    value = row.get(key)
    if type(value) is str:
        return value
    if key not in row:
        raise RowError("missing_key", f"`{key}` is missing")
    raise RowError("wrong_type", f"`{key}` must be text, found {type(value).__name__}")


def find_text(row: dict[str, Any], key: str) -> str:
    """The text under a key that may be absent or null: then empty."""
    return read_text(row, key) if row.get(key) is not None else ""


def read_list(row: dict[str, Any], key: str) -> list[Any]:
    """The list under a key that must be there; columns of a CSV hold it as JSON text."""
    value = row.get(key)
    if isinstance(value, str) and value[:1] == "[":
        value = read_json(value, key)
    if isinstance(value, list):
        return value
    if key not in row:
        raise RowError("missing_key", f"`{key}` is missing")
    raise RowError("wrong_type", f"`{key}` must be a list, found {type(value).__name__}")


def read_json(text: str, key: str) -> Any:
    """JSON that a dataset keeps as text."""
    try:
        return parse_nested(text)
    except RowError as error:
        if error.reason != "not_json":
            raise
        raise RowError("wrong_type", f"`{key}` is text that is not JSON") from None


def read_content(value: Any, number: int) -> str | None:
    """A message's content: text, null, or a list of text parts, which are joined as OpenAI's API joins them."""
    if value is None or type(value) is str:
        return value
    if not isinstance(value, list):
        raise RowError("wrong_type", f"message {number}: content must be text, found {type(value).__name__}")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowError("not_text", f"message {number} has a part of type `{kind}`; only text is trained")
        texts.append(part["text"])
    return "".join(texts)


def read_tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools offered in a row; datasets keep them as a list or as JSON text."""
    value = row.get("tools")
    if isinstance(value, str):
        value = read_json(value, "tools") if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("bad_tool_call", "`tools` must be a list of objects")
    return [_as_function(tool) for tool in value]


def _as_function(tool: dict[str, Any]) -> dict[str, Any]:
    """One shape for the flat and the nested spelling, or a mixed file would train two prompts for one tool."""
    return tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}


def refuse_role(role: Any, number: int, known: tuple[str, ...] = ROLES) -> RowError:
    """The error for a role that does not exist, with the nearest that does."""
    close = difflib.get_close_matches(str(role), known, 1)
    listed = ", ".join(known[:-1]) + f" or {known[-1]}"
    nearest = f"; did you mean `{close[0]}`?" if close else ""
    return RowError("unknown_role", f"message {number} has role `{str(role)[:80]}`; expected {listed}{nearest}")


def turns_of(messages: list[Message], name: str) -> tuple[str, list[Message]]:
    """Split off the system text; raises where messages carry what the named format has no place for."""
    for message in messages:
        extra = message.keys() - {"role", "content"}
        if extra or message["role"] == "tool":
            what = "tool turns" if message["role"] == "tool" else f"`{sorted(extra)[0]}`"
            raise RowError("wrong_kind", f"the {name} format has no place for {what}")
    has_system = bool(messages) and messages[0]["role"] == "system"
    return (messages[0]["content"], messages[1:]) if has_system else ("", messages)


def check_pairs(turns: list[Message], name: str) -> None:
    """Raise unless the turns alternate user, assistant and end with an answer."""
    roles = [turn["role"] for turn in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise RowError("wrong_kind", f"the {name} format holds pairs of user and assistant turns only")
