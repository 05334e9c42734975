"""What is asked of a host and what it says back, one JSON object a line; both sides of the socket use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import orjson

from luthier.errors import CallError

MOST_STOPS = 4
MOST_LIKELIEST = 20


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted: the conversation, the adapter to answer through, and how tokens are drawn."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    adapter: str | None = None
    """The adapter's folder; None asks the base model itself."""
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    likeliest: int = 0
    """How many of the likeliest tokens are told beside each."""

    def encode(self) -> bytes:
        """As a line."""
        return orjson.dumps(asdict(self), option=orjson.OPT_APPEND_NEWLINE)


def read_ask(line: bytes) -> Ask:
    """The other side of `encode`; raises CallError."""
    try:
        facts = orjson.loads(line)
        assert isinstance(facts, Mapping)
        known = {each.name for each in fields(Ask)}
        return Ask(**{**{key: facts[key] for key in known & facts.keys()}, "stop": tuple(facts.get("stop", ()))})
    except (ValueError, TypeError, AssertionError) as error:
        raise CallError(f"not a question to a host: {error}") from None


@dataclass(frozen=True)
class TokenSaid:
    """One token of an answer with its log-probability, and the likeliest tokens in its place."""

    text: str
    logprob: float
    likeliest: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Said:
    """A part of an answer: its text, its tokens, or how it ended.

    The first part tells how many tokens the prompt has; in the last one `finish` is `stop` or `length`.
    """

    text: str = ""
    tokens: tuple[TokenSaid, ...] = ()
    prompt_tokens: int | None = None
    answer_tokens: int = 0
    finish: str | None = None
    error: Mapping[str, Any] | None = None

    def encode(self) -> bytes:
        """As a line."""
        return orjson.dumps(asdict(self), option=orjson.OPT_APPEND_NEWLINE)


def read_said(line: bytes) -> Said:
    """The other side of `encode`."""
    facts = orjson.loads(line)
    tokens = tuple(
        TokenSaid(each["text"], each["logprob"], tuple((text, logprob) for text, logprob in each["likeliest"]))
        for each in facts.pop("tokens")
    )
    return Said(tokens=tokens, **facts)
