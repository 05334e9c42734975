"""Rows of answers that somebody has scored: one answer with its score, or a preference pair of two."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from luthier.data.check import check_messages
from luthier.data.example import Conversation, Message, Preference
from luthier.data.formats import find_format, preference
from luthier.data.formats.chat import read_messages
from luthier.data.formats.fields import find_text, read_text
from luthier.data.reasons import RowError

PROMPTS = ("prompt", "instruction", "question")
RESPONSES = ("response", "answer")
SCORES = ("score", "rating", "reward")
CRITIQUES = ("critique", "feedback", "rationale", "explanation")
_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Fields:
    """Keys of the source rows that hold each part, where a person named them."""

    prompt: str | None = None
    response: str | None = None
    score: str | None = None
    critique: str | None = None


@dataclass(frozen=True)
class ScoredAnswer:
    """One answer to a prompt; `side` is its place in a pair, and a pair may come without scores."""

    prompt: list[Message]
    response: str
    score: float | None
    critique: str
    side: str = ""


def read_scored(row: dict[str, Any], fields: Fields) -> list[ScoredAnswer]:
    """The scored answers of a row, the preferred one of a pair first; raises RowError."""
    if fields.response is None and preference.matches(row):
        return _read_pair(row, fields)
    prompt, response = _read_answer(row, fields)
    key = _find_key(row, fields.score, SCORES)
    score = _read_score(row, key or SCORES[0])
    return [_checked(ScoredAnswer(prompt, response, score, _read_critique(row, fields)))]


def _find_key(row: dict[str, Any], named: str | None, known: tuple[str, ...]) -> str | None:
    """The key that a person named, or the first known one that the row has."""
    return named or next((key for key in known if row.get(key) is not None), None)


def _read_answer(row: dict[str, Any], fields: Fields) -> tuple[list[Message], str]:
    """Prompt and answer under their keys, or a conversation in any format, whose last turn is the answer."""
    response = _find_key(row, fields.response, RESPONSES)
    prompt = _find_key(row, fields.prompt, PROMPTS)
    if response is not None and prompt is not None:
        return _read_prompt(row, prompt), read_text(row, response)
    example = find_format(row).read(row)
    if not isinstance(example, Conversation):
        raise RowError("wrong_kind", f"a scored answer is part of a conversation, found a {example.kind}")
    if not example.messages:
        raise RowError("missing_key", "`messages` is empty")
    return example.messages[:-1], _said(example.messages[-1])


def _read_prompt(row: dict[str, Any], key: str) -> list[Message]:
    value = row.get(key)
    messages = read_messages(value) if isinstance(value, list) else [_turn("user", read_text(row, key))]
    if messages and messages[0]["role"] != "system" and (system := find_text(row, "system")):
        messages.insert(0, _turn("system", system))
    return messages


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _said(message: Message) -> str:
    if message["role"] != "assistant":
        raise RowError("last_not_assistant", f"the last turn is `{message['role']}`; expected assistant")
    if message.get("tool_calls"):
        raise RowError("wrong_kind", "the answer calls a tool; only what an answer says is judged")
    return str(message["content"])


def _read_pair(row: dict[str, Any], fields: Fields) -> list[ScoredAnswer]:
    pair: Preference = preference.read(row)
    if pair.chosen == pair.rejected:
        raise RowError("chosen_equals_rejected", "`chosen` and `rejected` are the same answer")
    found = []
    for side, answer in zip(_SIDES, (pair.chosen, pair.rejected), strict=True):
        if not answer:
            raise RowError("empty_content", f"`{side}` says nothing")
        prompt = [*pair.prompt, *answer[:-1]]
        score = _find_side(row, side, (fields.score,) if fields.score else SCORES)
        critique = _find_side(row, side, (fields.critique,) if fields.critique else CRITIQUES)
        found.append(
            _checked(
                ScoredAnswer(
                    prompt,
                    _said(answer[-1]),
                    _read_score(row, score) if score else None,
                    find_text(row, critique).strip() if critique else "",
                    side,
                )
            )
        )
    if (found[0].score is None) != (found[1].score is None):
        raise RowError("missing_key", "only one answer of the pair has a score")
    return found


def _find_side(row: dict[str, Any], side: str, names: tuple[str, ...]) -> str | None:
    """The key of one side of a pair: `chosen_score` or `score_chosen`."""
    keys = (key for name in names for key in (f"{side}_{name}", f"{name}_{side}"))
    return next((key for key in keys if row.get(key) is not None), None)


def _read_score(row: dict[str, Any], key: str) -> float:
    value = row.get(key)
    if key not in row or value is None:
        raise RowError("missing_key", f"`{key}` is missing")
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise RowError("wrong_type", f"`{key}` must be a number, found {str(value)[:40]!r}")
    return score


def _read_critique(row: dict[str, Any], fields: Fields) -> str:
    key = _find_key(row, fields.critique, CRITIQUES)
    return find_text(row, key).strip() if key else ""


def _checked(answer: ScoredAnswer) -> ScoredAnswer:
    """Prompt and answer have to be a conversation, as every trained row."""
    check_messages([*answer.prompt, _turn("assistant", answer.response)])
    if not any(message["role"] == "user" for message in answer.prompt):
        raise RowError("wrong_order", "the prompt has no user turn")
    return answer
