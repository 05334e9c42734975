"""Comparison and certificate of a run as the report needs them, read from files that may be absent or of any shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import orjson

from luthier.errors import RunError
from luthier.runs.events import redact

COMPARISON = "comparison.json"
CERTIFICATE = "certificate.json"
Change = Literal["better", "worse", "no detectable difference"]
_PAIRS = 2


@dataclass(frozen=True)
class Metric:
    """One metric of base and tuned, their difference and its interval."""

    name: str
    base: float | None
    tuned: float | None
    difference: float | None
    low: float | None
    high: float | None
    change: Change
    counts: tuple[int, int, int] | None = None
    """Rows that the tuned model won, in which both are even, and that it lost."""

    @property
    def has_interval(self) -> bool:
        """Whether the difference came with its interval."""
        return None not in (self.difference, self.low, self.high)


@dataclass(frozen=True)
class Answer:
    """One prompt and what both models say to it."""

    prompt: str
    base: str | None
    tuned: str
    reference: str | None = None
    base_score: float | None = None
    tuned_score: float | None = None

    @property
    def gain(self) -> float | None:
        """How much better the tuned answer scores; its score alone where the base has none."""
        if self.tuned_score is None:
            return None
        return self.tuned_score - (self.base_score or 0.0)


@dataclass(frozen=True)
class Drift:
    """Something of the answers that has no good direction, such as their length; `said` is how it changed."""

    name: str
    base: float | None
    tuned: float | None
    low: float | None
    high: float | None
    said: str


@dataclass(frozen=True)
class Overlap:
    """Rows that were asked or measured, and how many of them, or of their prompts, stand among the training rows."""

    rows: int
    training_rows: int
    same_row: int
    same_prompt: int


@dataclass(frozen=True)
class Repeats:
    """Answers that repeat a training answer and are not the right one; None of a model that was not asked."""

    answers: int
    tuned: int
    base: int | None = None


@dataclass(frozen=True)
class Circumstances:
    """How the prompts were asked; `cut` are the answers of base and tuned that had not ended at the limit."""

    source: str
    prompts: int
    max_tokens: int
    temperature: float
    seed: int
    cut: tuple[int, int]


@dataclass(frozen=True)
class Comparison:
    """Base against tuned on the same prompts; what a comparison does not tell of is None or empty."""

    base_model: str
    verdict: str
    metrics: tuple[Metric, ...]
    answers: tuple[Answer, ...]
    drift: tuple[Drift, ...] = ()
    forgetting: Metric | None = None
    overlap: Overlap | None = None
    repeats: Repeats | None = None
    asked: Circumstances | None = None
    score: str = ""
    """By what the answers are scored."""
    notes: tuple[str, ...] = ()

    def named(self, change: Change) -> list[str]:
        """The metrics that changed so."""
        return [metric.name for metric in self.metrics if metric.change == change]


@dataclass(frozen=True)
class Claim:
    """One claim of the certificate."""

    claim: str
    found: str
    allowed: str
    holds: bool


@dataclass(frozen=True)
class Certificate:
    """Whether the artefact is what was trained."""

    is_valid: bool
    claims: tuple[Claim, ...]

    @property
    def broken(self) -> list[Claim]:
        """The claims that do not hold."""
        return [claim for claim in self.claims if not claim.holds]


def read_comparison(folder: Path) -> Comparison | None:
    """The comparison of a run folder; None when there is none, RunError when it cannot be read."""
    content = _read(folder / COMPARISON)
    if content is None:
        return None
    try:
        return build_comparison(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(folder / COMPARISON) from error


def build_comparison(content: Mapping[str, Any]) -> Comparison:
    """What `comparison.json` holds, or a comparison that was not written yet."""
    forgetting, overlap, repeats, asked = (
        content.get(name) or None for name in ("forgetting", "contamination", "parroting", "asked")
    )
    return Comparison(
        str(content.get("base_model") or ""),
        str(content.get("verdict", "")),
        tuple(_metric(str(name), entry) for name, entry in content.get("metrics", {}).items()),
        tuple(_answer(entry) for entry in content.get("results", [])),
        tuple(_drift(str(name), entry) for name, entry in (content.get("drift") or {}).items()),
        _metric(str(forgetting["metric"]), forgetting) if forgetting else None,
        Overlap(**{each.name: int(overlap[each.name]) for each in fields(Overlap)}) if overlap else None,
        Repeats(int(repeats["answers"]), int(repeats["tuned"]), _count(repeats.get("base"))) if repeats else None,
        _circumstances(asked) if asked else None,
        str(content.get("score") or ""),
        tuple(str(note) for note in content.get("notes", [])),
    )


def read_certificate(folder: Path) -> Certificate | None:
    """The certificate of a run folder; None when there is none, RunError when it cannot be read."""
    content = _read(folder / CERTIFICATE)
    if content is None:
        return None
    try:
        claims = tuple(
            Claim(str(each["claim"]), str(each["found"]), str(each["allowed"]), each["holds"] is True)
            for each in content["claims"]
        )
    except (KeyError, TypeError) as error:
        raise _unreadable(folder / CERTIFICATE) from error
    # A certificate that calls itself valid beside a claim that does not hold, or without any claim, is not.
    is_valid = content.get("valid") is True and bool(claims) and all(claim.holds for claim in claims)
    return Certificate(is_valid, claims)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(path) from error
    if not isinstance(content, dict):
        raise _unreadable(path)
    return content


def _unreadable(path: Path) -> RunError:
    return RunError(f"{path.name} cannot be read", hint="make it again, or move it away", where=str(path))


def _metric(name: str, entry: dict[str, Any]) -> Metric:
    numbers = {key: _number(entry.get(key)) for key in ("base", "tuned", "difference", "low", "high")}
    said = entry.get("verdict")
    change: Change = said if said in ("better", "worse") else "no detectable difference"
    won, even, lost = (_count(entry.get(key)) for key in ("wins", "ties", "losses"))
    counts = None if won is None or even is None or lost is None else (won, even, lost)
    return Metric(name, **numbers, change=change, counts=counts)


def _drift(name: str, entry: dict[str, Any]) -> Drift:
    numbers = {key: _number(entry.get(key)) for key in ("base", "tuned", "low", "high")}
    return Drift(name, **numbers, said=str(entry.get("verdict", "")))


def _circumstances(asked: dict[str, Any]) -> Circumstances:
    cut = asked.get("cut") or {}
    return Circumstances(
        str(asked["from"]),
        int(asked["prompts"]),
        int(asked["max_tokens"]),
        float(asked["temperature"]),
        int(asked["seed"]),
        (_count(cut.get("base")) or 0, _count(cut.get("tuned")) or 0),
    )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _answer(entry: dict[str, Any]) -> Answer:
    return Answer(
        prompt=_conversation(entry["prompt"]),
        base=_text(entry.get("base_response")),
        tuned=_text(entry["lora_response"]) or "",
        reference=_text(entry.get("reference")),
        base_score=_number(entry.get("base_score")),
        tuned_score=_number(entry.get("lora_score")),
    )


def _conversation(value: Any) -> str:
    """A prompt: text as it is, messages one below the other, each behind who says it unless one person alone speaks."""
    is_messages = isinstance(value, list) and all(
        isinstance(each, dict) and each.keys() >= {"role", "content"} and isinstance(each["content"], str)
        for each in value
    )
    if not value or not is_messages:
        return _text(value) or ""
    if len(value) == 1 and value[0]["role"] == "user":
        return _text(value[0]["content"]) or ""
    return _text("\n\n".join(f"{each['role']}: {each['content']}" for each in value)) or ""


def _text(value: Any) -> str | None:
    """Text as it is, anything else as JSON."""
    if value is None:
        return None
    return str(redact(value if isinstance(value, str) else orjson.dumps(value).decode()))


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def choose_answers(answers: Sequence[Answer]) -> list[tuple[str, Answer]]:
    """Six answers and why each is shown: two best, two of the middle, two worst by score; else the first six."""
    scored = sorted((each for each in answers if each.gain is not None), key=lambda each: -(each.gain or 0.0))
    is_even = len(scored) > 1 and scored[0].gain == scored[-1].gain
    if len(scored) < len(answers) or not scored or is_even:
        return [("", answer) for answer in answers[: 3 * _PAIRS]]
    if len(scored) <= 3 * _PAIRS:
        third = len(scored) / 3
        return [(("best", "median", "worst")[min(2, int(n / third))], each) for n, each in enumerate(scored)]
    middle = (len(scored) - _PAIRS) // 2
    return [
        *(("best", each) for each in scored[:_PAIRS]),
        *(("median", each) for each in scored[middle : middle + _PAIRS]),
        *(("worst", each) for each in scored[-_PAIRS:]),
    ]
