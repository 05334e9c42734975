"""What a player model is asked and how its answer is read: an action by name, or as the call of a tool."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from world import ACTIONS, BRIEF, RULES

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "act",
        "description": "Take one step in the game.",
        "parameters": {
            "type": "object",
            "properties": {"action": {"type": "string", "enum": list(ACTIONS)}},
            "required": ["action"],
        },
    },
}
WORDS = {
    "noop": "wait",
    "move_left": "left",
    "move_right": "right",
    "move_up": "up",
    "move_down": "below",
    "do": "do",
    "sleep": "sleep",
    "place_stone": "place stone",
    "place_table": "place table",
    "place_furnace": "place furnace",
    "place_plant": "place seed",
    "make_wood_pickaxe": "make log axe",
    "make_stone_pickaxe": "make stone axe",
    "make_iron_pickaxe": "make iron axe",
    "make_wood_sword": "make log sword",
    "make_stone_sword": "make stone sword",
    "make_iron_sword": "make iron sword",
}
"""What a small model answers in brief. `move_down` and `make_wood_sword` hold tokens that the practice model's training
taught it never to say; an adapter leaves its vocabulary frozen and cannot teach them (docs/guides/crafter.md)."""
_MEANT = {words: name for name, words in WORDS.items()}
_THOUGHT_END = "</think>"
_CALL = re.compile(r"\{.*\}", re.S)
# `do`, `noop` and `sleep` are words of other sentences too; they count where nothing else is said.
_NAMED = re.compile(
    r"\b(" + "|".join(sorted((name for name in ACTIONS if "_" in name), key=len, reverse=True)) + r")\b"
)


@dataclass(frozen=True)
class Form:
    """How the game is put to a model: with its rules and names or in brief, and with a tool or without."""

    rules: bool = False
    tools: bool = False

    def messages(self, observation: str) -> list[dict[str, Any]]:
        """The conversation that waits for an action."""
        system = RULES if self.rules else BRIEF
        return [{"role": "system", "content": system}, {"role": "user", "content": observation}]

    def row(self, observation: str, action: str) -> dict[str, Any]:
        """A row that teaches an action."""
        if not self.tools:
            said = action if self.rules else WORDS[action]
            return {"messages": [*self.messages(observation), {"role": "assistant", "content": said}]}
        call = {"type": "function", "function": {"name": "act", "arguments": {"action": action}}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        return {"messages": [*self.messages(observation), answer], "tools": [TOOL]}

    @property
    def max_tokens(self) -> int:
        """Room for the longest answer, and no more: a model that rambles names no action."""
        return 64 if self.tools else 16 if self.rules else 8

    @property
    def tool_list(self) -> list[dict[str, Any]] | None:
        """Tools that are offered."""
        return [TOOL] if self.tools else None


def read_action(answer: str) -> str:
    """The action that an answer names; what names none comes back as it is, and is a step spent doing nothing."""
    said = answer.rpartition(_THOUGHT_END)[2].strip()
    if called := _read_call(said):
        return called
    plain = " ".join(said.strip("`'\".!* \n").lower().split())
    if plain in _MEANT:
        return _MEANT[plain]
    if (name := plain.replace(" ", "_")) in ACTIONS:
        return name
    named = _NAMED.search(said.lower())
    return named[0] if named else said


def _read_call(said: str) -> str:
    try:
        found = json.loads(match[0]) if (match := _CALL.search(said)) else None
    except ValueError:
        return ""
    arguments = found.get("arguments", found) if isinstance(found, dict) else None
    action = arguments.get("action") if isinstance(arguments, dict) else None
    return action if isinstance(action, str) else ""
