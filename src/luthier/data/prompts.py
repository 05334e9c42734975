"""A person's own prompts from a file: to be answered, compared or asked about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from luthier.data.example import ROLES, Message
from luthier.errors import CallError, DataError, MissingPathError


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for its answer, and the answer it should get where somebody knows it."""

    messages: list[Message]
    reference: str | None = None


def read_prompts(path: Path, *, drop_answers: bool = False) -> list[Prompt]:
    """Prompts of a file: a JSON list, JSON lines, or plain lines of text; answers at the end of one may be dropped."""
    if not path.is_file():
        raise MissingPathError(
            f"no prompts at {path}", hint="a .json or .jsonl file, or text with a prompt on each line"
        )
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    found = [
        _read_prompt(entry, f"{path.name}:{place}", drop_answers=drop_answers)
        for place, entry in _list_entries(path, text)
    ]
    if not found:
        raise DataError(f"{path}: holds no prompt")
    return found


def _list_entries(path: Path, text: str) -> list[tuple[int, Any]]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if path.suffix not in (".json", ".jsonl", ".ndjson"):
        return [(number, line) for number, line in lines]
    try:
        if path.suffix == ".json":
            whole = orjson.loads(text)
            entries = whole.get("prompts") if isinstance(whole, dict) else whole
            if not isinstance(entries, list):
                raise DataError(f"{path}: expected a list of prompts", hint='such as ["Hello!", "What is 2 plus 3?"]')
            return list(enumerate(entries, 1))
        return [(number, orjson.loads(line)) for number, line in lines]
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: {error}") from None


def _read_prompt(entry: Any, where: str, *, drop_answers: bool) -> Prompt:
    """A text, a list of messages, or an object with either as `prompt` (or `messages`), and a `reference`."""
    reference = None
    if isinstance(entry, dict):
        reference = entry.get("reference")
        if reference is not None and not isinstance(reference, str):
            raise DataError(f"{where}: `reference` must be text")
        entry = entry.get("prompt", entry.get("messages"))
    if isinstance(entry, str) and entry.strip():
        return Prompt([_user(entry)], reference)
    if not isinstance(entry, list) or not entry:
        raise DataError(f"{where}: expected a text, a list of messages, or an object with a `prompt`")
    for number, message in enumerate(entry, 1):
        is_message = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not is_message or message.get("role") not in ROLES:
            raise DataError(f"{where}: message {number} needs a `role` ({', '.join(ROLES)}) and a `content`")
    while drop_answers and len(entry) > 1 and entry[-1]["role"] == "assistant":
        entry = entry[:-1]
    if entry[-1]["role"] == "assistant":
        raise CallError(
            f"{where}: the prompt is answered already: its last message is the assistant's",
            hint="rows with their answers go to --data",
        )
    return Prompt([{key: message[key] for key in ("role", "content")} for message in entry], reference)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
