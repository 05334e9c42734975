"""A person's own prompts from a file: a line of text each, or JSON rows with `prompt` or `messages`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from luthier.data.example import Message
from luthier.errors import DataError, MissingPathError

_MOST_PROMPTS = 64


def read_chats(path: Path) -> list[list[Message]]:
    """Conversations that wait for an answer; an answer at their end is left out."""
    if not path.is_file():
        raise MissingPathError(f"no file at {path}", hint="--prompts names a file with a prompt on each line")
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    if not lines:
        raise DataError(f"{path}: no prompts", hint="write one on each line")
    return [_read_line(f"{path.name}:{number}", line) for number, line in enumerate(lines[:_MOST_PROMPTS], 1)]


def _read_line(where: str, line: str) -> list[Message]:
    try:
        row = orjson.loads(line)
    except ValueError:
        row = line
    if isinstance(row, dict):
        row = row.get("prompt") or row.get("messages")
    if isinstance(row, str):
        return [{"role": "user", "content": row}]
    if not isinstance(row, list) or not all(_is_message(each) for each in row):
        raise DataError(f"{where}: neither text nor a row with `prompt` or `messages`", where=where)
    chat: list[Message] = list(row)
    while chat and chat[-1]["role"] == "assistant":
        chat.pop()
    if not chat:
        raise DataError(f"{where}: nothing is asked", where=where)
    return chat


def _is_message(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("role"), str) and isinstance(row.get("content"), str)
