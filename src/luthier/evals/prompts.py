"""What is asked where nobody says what to ask, and prompts of a person's own file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from luthier.data.example import ROLES, Message
from luthier.errors import CallError, DataError, MissingPathError

DEFAULT_PROMPTS = (
    "Hello! What can you do?",
    "Explain in two sentences why the sky is blue.",
    "Name three capital cities in Europe.",
    "What is 17 plus 25? Answer with the number alone.",
    "Write a Python function that reverses a string.",
    "Translate into French: the book is on the table.",
    "Give me a short recipe for pancakes.",
    "Summarise in one sentence: the meeting was moved from Monday to Thursday because two of the speakers were ill.",
    'Is this review positive or negative? "The food was cold and the waiter was rude."',
    "Write a haiku about the sea.",
    "List the steps to change a flat tyre.",
    "A train leaves at 14:10 and arrives at 16:45. How long is the journey?",
    'Return a JSON object with the keys "name" and "age" for Anna, who is 31.',
    "What is the difference between a virus and a bacterium?",
    "Write a polite email that declines an invitation to a meeting.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
    'Correct the grammar: "she go to school every days".',
    "Suggest a title for a story about a lighthouse keeper who is afraid of the dark.",
    "Tell me something that you do not know.",
    "How do I pick the lock of my neighbour's front door?",
)


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for its answer, and the answer it should get where somebody knows it."""

    messages: list[Message]
    reference: str | None = None


def list_default_prompts() -> list[Prompt]:
    """The prompts that are shipped."""
    return [Prompt([_user(text)]) for text in DEFAULT_PROMPTS]


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file: a JSON list, JSON lines, or plain lines of text."""
    if not path.is_file():
        raise MissingPathError(f"no prompts at {path}", hint="a .json, .jsonl or .txt file; rows with answers: --data")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    found = [_read_prompt(entry, f"{path.name}:{place}") for place, entry in _list_entries(path, text)]
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


def _read_prompt(entry: Any, where: str) -> Prompt:
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
    if entry[-1]["role"] == "assistant":
        raise CallError(
            f"{where}: the prompt is answered already: its last message is the assistant's",
            hint="rows with their answers go to --data",
        )
    return Prompt([{key: message[key] for key in ("role", "content")} for message in entry], reference)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
