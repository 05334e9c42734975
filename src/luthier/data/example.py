"""Example: the one canonical training row, whatever format it came in.

A conversation, a preference pair or a plain text. Messages are plain dicts of the keys in `MESSAGE_KEYS`, because a
chat template reads them as they are; a tool call's arguments are an object, never a string of JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "weight")

Message = dict[str, Any]


@dataclass(slots=True)
class Conversation:
    """Turns of system, user, assistant and tool, and the tools that were offered."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    kind: Literal["conversation"] = "conversation"


@dataclass(slots=True)
class Preference:
    """A prompt with the answer people preferred and the one they did not."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[dict[str, Any]] | None = None
    kind: Literal["preference"] = "preference"


@dataclass(slots=True)
class Text:
    """Plain text, trained whole."""

    text: str
    kind: Literal["text"] = "text"


Example = Conversation | Preference | Text


def user_text(example: Example) -> str:
    """What the person said: two examples with the same of it have the same prompt."""
    if isinstance(example, Text):
        return example.text
    messages = example.messages if isinstance(example, Conversation) else example.prompt
    return "\n".join([m["content"] for m in messages if m["role"] == "user"])
