"""Exact match: greedy answers to held-out rows, compared with what the rows say."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from luthier.data.render import Question
from luthier.engines.verbs import SampleParams, Sampler, Tick
from luthier.evals.heldout import HeldOut, Place

# An answer that is longer than every expected one by so many tokens is wrong, however it would end.
_SPARE_TOKENS = 32
_CONFIDENCE = 1.959963984540054  # of 95 %
_THOUGHT_END = "</think>"


@dataclass(frozen=True)
class Answer:
    """One row answered; `is_cut` says that the answer had not ended when it was as long as it may be."""

    place: Place
    question: Question
    got: str
    is_cut: bool

    @property
    def is_right(self) -> bool:
        """Equal but for white space at the ends; thoughts do not count."""
        return not self.is_cut and said(self.got) == said(self.question.answer)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        file, line = self.place
        asked = self.question
        return {"file": file, "line": line, "prompt": asked.prompt, "expected": asked.answer, "got": self.got}


@dataclass(frozen=True)
class ExactMatch:
    """How many rows a model answers exactly as they do."""

    answers: tuple[Answer, ...]
    tokens: int
    seconds: float

    @property
    def rows(self) -> int:
        """Rows that were asked."""
        return len(self.answers)

    @property
    def right(self) -> int:
        """Answers that are right."""
        return sum(answer.is_right for answer in self.answers)

    @property
    def share(self) -> float:
        """Share of the answers that are right."""
        return self.right / self.rows

    @property
    def interval(self) -> tuple[float, float]:
        """Where the share of all such rows lies, with 95 % confidence."""
        return wilson_interval(self.right, self.rows)

    @property
    def cut(self) -> int:
        """Answers that were cut off."""
        return sum(answer.is_cut for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        """Tokens written a second, without loading the model."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def wrong(self) -> list[Answer]:
        """Answers that are not right."""
        return [answer for answer in self.answers if not answer.is_right]

    def as_dict(self, *, wrong: int) -> dict[str, Any]:
        """For `--json`, with so many wrong answers."""
        return {
            "rows": self.rows,
            "right": self.right,
            "share": self.share,
            "interval_95": list(self.interval),
            "cut": self.cut,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "wrong": [each.as_dict() for each in self.wrong[:wrong]],
        }


def wilson_interval(right: int, count: int, z: float = _CONFIDENCE) -> tuple[float, float]:
    """Wilson's interval of a share, which holds for small counts and at 0 and 1 too."""
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / count + spread / count / 4) / (1 + spread)
    # Rounding must not put a share of 0 or 1 outside its own interval.
    return (0.0 if right == 0 else middle - half), (1.0 if right == count else middle + half)


def count_changes(first: ExactMatch, second: ExactMatch) -> tuple[int, int]:
    """Rows that only the first has right, and rows that only the second has."""
    rights = [{answer.place for answer in each.answers if answer.is_right} for each in (first, second)]
    return len(rights[0] - rights[1]), len(rights[1] - rights[0])


def measure_exact_match(
    sampler: Sampler, held_out: HeldOut, *, max_tokens: int | None = None, tick: Tick | None = None
) -> ExactMatch:
    """The model's greedy answers, each up to its end of turn."""
    places, questions = zip(*held_out.questions, strict=True)
    if max_tokens is None:
        max_tokens = max(len(ids) for ids in held_out.encode([each.answer for each in questions])) + _SPARE_TOKENS
    prompts = held_out.encode([each.prompt for each in questions])
    params = SampleParams(max_tokens=max_tokens, stop_tokens=held_out.stop_tokens())
    started = time.perf_counter()
    drawn = sampler.sample(prompts, params, tick)
    seconds = time.perf_counter() - started
    decoded = held_out.text.tokenizer.decode_batch(drawn, skip_special_tokens=False)
    answers = tuple(
        Answer(place, question, held_out.reader.answer(got), is_cut=len(tokens) >= max_tokens)
        for place, question, got, tokens in zip(places, questions, decoded, drawn, strict=True)
    )
    return ExactMatch(answers, sum(len(tokens) for tokens in drawn), seconds)


def said(answer: str) -> str:
    """An answer without thoughts and the white space at its ends."""
    return answer.rpartition(_THOUGHT_END)[2].strip()
