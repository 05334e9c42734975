"""What messages say, and whether a rendered text says it: the checks on every conversation that was not joined."""

from __future__ import annotations

import orjson

from luthier.data.example import Message
from luthier.data.notes import DROPPED, THINKING
from luthier.data.reasons import RowError

# Shorter words may be part of a template's own frame, as `json` is in GPT-OSS's calls.
_TELLING_LENGTH = 12


def own_words(message: Message) -> str:
    """What a message says, apart from thinking and edge whitespace, which templates may take out."""
    return (message.get("content") or "").rpartition("</think>")[2].strip()


def find_last(words: str, text: str, low: int, high: int) -> int | None:
    """The end of the last place where the words stand, as they are or quoted as JSON; None where they do not."""
    for spelt in (words, orjson.dumps(words).decode()[1:-1]):
        found = text.rfind(spelt, low, high) if spelt else -1
        if found >= 0:
            return found + len(spelt)
    return None


def holds_another(turn: str, messages: list[Message], index: int) -> bool:
    """Whether a turn's text holds what a neighbour says and the turn itself does not: then its bounds are wrong."""
    own = orjson.dumps(messages[index]).decode()
    for other in (index - 1, index + 1):
        words = own_words(messages[other]) if 0 <= other < len(messages) else ""
        if len(words) >= _TELLING_LENGTH and words in turn and find_last(words, own, 0, len(own)) is None:
            return True
    return False


def check_calls(text: str, turns: dict[int, tuple[int, int]], messages: list[Message]) -> None:
    """A template without tools renders a call as an empty turn, which would teach the model to say nothing."""
    for index, (start, end) in turns.items():
        for call in messages[index].get("tool_calls") or ():
            name = call["function"]["name"]
            if name not in text[start:end]:
                where = f"message {index + 1}"
                raise RowError("template_refused", f"the chat template leaves out the call of `{name}` in {where}")


def find_losses(text: str, messages: list[Message]) -> set[str]:
    """Notes of what the template took out: thinking, or whole messages."""
    notes = set()
    for message in messages:
        content = message.get("content") or ""
        thought = message.get("reasoning_content") or (
            content.partition("</think>")[0] if "</think>" in content else ""
        )
        thought = thought.replace("<think>", "").strip()
        if message["role"] == "assistant" and thought and find_last(thought, text, 0, len(text)) is None:
            notes.add(THINKING)
        words = own_words(message)
        if words and find_last(words, text, 0, len(text)) is None:
            notes.add(DROPPED)
    return notes
