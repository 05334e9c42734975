"""Conversations of a judge: a prompt and an answer to it in, a critique and a score out, for a generative reward model.

Answers to the same prompt carry the same `prompt_id`. By it `data.group_by` keeps them on one side of a split, and a
comparison of judges asks whether the better of two answers gets the higher score. Of a pair without scores only the
order is known: its rows carry `score_known = false`, and nobody holds a judge to their numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from luthier.data.example import Conversation, Message
from luthier.data.hashes import content_hash, hash_bytes
from luthier.data.parse import check_parsed, parse_line
from luthier.data.reasons import RowError
from luthier.data.scored import Fields, ScoredAnswer, read_scored
from luthier.data.source import Row
from luthier.errors import CallError, MissingPathError

PROMPT_ID = "prompt_id"
SCORE_KNOWN = "score_known"
TEMPLATE = (
    "Judge the answer to the prompt. Say briefly what is right and what is wrong with it. Then end with one line, "
    '"Score: " and a number from {low} (worst) to {high} (best).{rubric}\n\n'
    "[Prompt]\n{prompt}\n\n[Answer]\n{response}\n[End of the answer]"
)
REPLY = "{critique}\nScore: {score}"
# From the share of the scale that a score reaches to what is said of it where nobody said more.
_BANDS = (
    (1.0, "The answer is right and complete."),
    (0.7, "The answer is good, with a small fault."),
    (0.4, "The answer is partly right; something that matters is wrong or missing."),
    (0.1, "Most of the answer is wrong or missing."),
    (0.0, "The answer is wrong or of no use."),
)
_SLOT = re.compile(r"\{(prompt|response|critique|score|low|high|rubric)\}")
_RUBRIC_LINE = re.compile(r"(-?\d+(?:\.\d+)?)\s*:\s*(\S.*)")


@dataclass(frozen=True)
class Judging:
    """How scored answers become conversations."""

    low: float = 1.0
    high: float = 5.0
    step: float = 1.0
    source_scale: tuple[float, float] | None = None
    template: str = TEMPLATE
    reply: str = REPLY
    rubric: Mapping[float, str] = field(default_factory=dict)
    fields: Fields = field(default_factory=Fields)


@dataclass(frozen=True)
class Judged:
    """One answer as a judge is asked about it, and what the judge should say."""

    answer: ScoredAnswer
    score: float
    is_rounded: bool
    asked: str
    said: str

    def as_row(self, place: str) -> dict[str, Any]:
        """A chat row."""
        prompt = Conversation([{"role": each["role"], "content": each["content"]} for each in self.answer.prompt])
        return {
            "messages": [{"role": "user", "content": self.asked}, {"role": "assistant", "content": self.said}],
            PROMPT_ID: f"{content_hash(prompt):016x}",
            "source": f"{place}:{self.answer.side}" if self.answer.side else place,
            **({SCORE_KNOWN: False} if self.answer.score is None else {}),
        }


@dataclass
class Tally:
    """What became of the answers, beside the counts of the rows."""

    answers: int = 0
    pairs: int = 0
    scores: dict[float, int] = field(default_factory=dict)
    own_critiques: int = 0
    rounded: int = 0
    contradicted: int = 0
    seen: dict[int, float] = field(default_factory=dict)

    def count(self, judged: Judged) -> None:
        """Add one answer; one that was judged before with another score contradicts it."""
        self.answers += 1
        self.scores[judged.score] = self.scores.get(judged.score, 0) + 1
        self.own_critiques += bool(judged.answer.critique)
        self.rounded += judged.is_rounded
        self.contradicted += self.seen.setdefault(hash_bytes(judged.asked.encode()), judged.score) != judged.score

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "conversations": self.answers,
            "pairs": self.pairs,
            "scores": {f"{score:g}": self.scores[score] for score in sorted(self.scores)},
            "critiques": {"own": self.own_critiques, "by_rubric": self.answers - self.own_critiques},
            "rounded": self.rounded,
            "contradicted": self.contradicted,
        }


def check_judging(judging: Judging) -> None:
    """Raise CallError for a scale or a template that cannot work."""
    for name, low, high in (
        ("--scale", judging.low, judging.high),
        ("--source-scale", *(judging.source_scale or (0, 1))),
    ):
        if not low < high:
            raise CallError(f"{name} goes from {low:g} to {high:g}", hint="the lowest score comes first")
    if not 0 < judging.step <= judging.high - judging.low:
        raise CallError(f"--step {judging.step:g} does not fit into the scale")
    _check_slots("--template", judging.template, ("prompt", "response"), ("critique", "score"))
    _check_slots("--reply", judging.reply, ("critique", "score"), ("prompt", "response", "rubric"))
    if "{score}" not in judging.reply.rstrip().rpartition("\n")[2]:
        raise CallError("--reply: {score} does not stand in the last line", hint="a score is read from the last line")
    for score in judging.rubric:
        if not judging.low <= score <= judging.high:
            raise CallError(f"--rubric: {score:g} is not between {judging.low:g} and {judging.high:g}")


def _check_slots(name: str, text: str, needed: tuple[str, ...], foreign: tuple[str, ...]) -> None:
    for slot in needed:
        if f"{{{slot}}}" not in text:
            raise CallError(
                f"{name}: {{{slot}}} does not stand in it", hint=f"it needs {', '.join(map(_slot, needed))}"
            )
    for slot in foreign:
        if f"{{{slot}}}" in text:
            raise CallError(f"{name}: {{{slot}}} has no place in it")


def _slot(name: str) -> str:
    return f"{{{name}}}"


def read_rubric(path: Path) -> dict[float, str]:
    """A sentence for each score from a file of lines such as `5: right and complete`."""
    found: dict[float, str] = {}
    for number, line in enumerate(read_template(path).splitlines(), 1):
        if not line.strip():
            continue
        match = _RUBRIC_LINE.fullmatch(line.strip())
        if match is None:
            raise CallError(f"{path}:{number}: expected a score, a colon and a sentence", hint="such as `5: right`")
        if float(match[1]) in found:
            raise CallError(f"{path}:{number}: the score {match[1]} stands twice")
        found[float(match[1])] = match[2].strip()
    if not found:
        raise CallError(f"{path}: holds no scores", hint="a line for each, such as `5: right and complete`")
    return found


def read_template(path: Path) -> str:
    """The text of a file that a person named, without the line break at its end."""
    try:
        return path.read_text("utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise MissingPathError(f"{path}: cannot be read: {reason}") from None


def judge_row(row: Row, place: str, judging: Judging, tally: Tally) -> list[dict[str, Any]]:
    """The conversations of one row, each with its `prompt_id` and where it came from; raises RowError."""
    judged = [_judge(answer, judging) for answer in read_scored(_parsed(row), judging.fields)]
    if len(judged) == 2 and judged[0].score < judged[1].score:
        raise RowError(
            "chosen_scores_lower",
            f"`chosen` has the score {judged[0].score:g} and `rejected` {judged[1].score:g}",
        )
    tally.pairs += len(judged) == 2
    for each in judged:
        tally.count(each)
    return [each.as_row(place) for each in judged]


def _judge(answer: ScoredAnswer, judging: Judging) -> Judged:
    score, is_rounded = _on_scale(answer, judging)
    critique = answer.critique or derive_critique(score, judging)
    return Judged(
        answer,
        score,
        is_rounded,
        asked=_fill(judging.template, judging, prompt=_transcript(answer.prompt), response=answer.response),
        said=_fill(judging.reply, judging, critique=critique, score=f"{score:g}"),
    )


def _parsed(row: Row) -> dict[str, Any]:
    if isinstance(row, RowError):
        raise row
    if isinstance(row, bytes):
        return parse_line(row)
    check_parsed(row)
    return row


def _on_scale(answer: ScoredAnswer, judging: Judging) -> tuple[float, bool]:
    """The score on the judge's scale, and whether it had to be rounded; a pair without scores gets the two ends."""
    low, high = judging.low, judging.high
    if answer.score is None:
        return (high if answer.side == "chosen" else low), False
    first, last = judging.source_scale or (low, high)
    if not first <= answer.score <= last:
        raise RowError("score_off_scale", f"the score {answer.score:g} is not between {first:g} and {last:g}")
    exact = low + (answer.score - first) / (last - first) * (high - low)
    # Halves go up, whatever the number: 2.5 and 3.5 become 3 and 4.
    steps = math.floor(round((exact - low) / judging.step, 9) + 0.5)
    score = min(high, round(low + steps * judging.step, 9))
    return score, not math.isclose(score, exact, abs_tol=1e-9)


def derive_critique(score: float, judging: Judging) -> str:
    """What the rubric says of a score: its own sentence, or that of the next lower score that has one."""
    if judging.rubric:
        below = [each for each in judging.rubric if each <= score + 1e-9]
        return judging.rubric[max(below) if below else min(judging.rubric)]
    share = (score - judging.low) / (judging.high - judging.low)
    return next(sentence for least, sentence in _BANDS if share >= least - 1e-9)


def _fill(text: str, judging: Judging, **parts: str) -> str:
    """All slots in one pass, so that braces inside a prompt or an answer stay what they are."""
    listed = "".join(f"\n{score:g}: {sentence}" for score, sentence in sorted(judging.rubric.items(), reverse=True))
    filled = {
        "low": f"{judging.low:g}",
        "high": f"{judging.high:g}",
        "rubric": f"\n\n[Scores]{listed}" if listed else "",
        **parts,
    }
    return _SLOT.sub(lambda match: filled.get(match[1], match[0]), text)


def _transcript(messages: list[Message]) -> str:
    """A prompt as text: a single question as it is, a longer one with the names of who speaks."""
    if any(message.get("tool_calls") for message in messages):
        raise RowError("wrong_kind", "the prompt holds tool calls; a judge is shown what was said")
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


@dataclass(frozen=True)
class Marks:
    """What a row says of itself beside its conversation; of a pair without scores only the order is known."""

    prompt_id: str = ""
    is_score_known: bool = True


def read_marks(row: Row) -> Marks:
    """The marks of a judge's row; of any other row, that there are none."""
    if isinstance(row, bytes):
        row = orjson.loads(row) if f'"{PROMPT_ID}"'.encode() in row else {}
    value = row.get(PROMPT_ID) if isinstance(row, dict) else None
    if not isinstance(row, dict) or not isinstance(value, str):
        return Marks()
    return Marks(value, row.get(SCORE_KNOWN) is not False)
