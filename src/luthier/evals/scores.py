"""Answers that end with a score, held against the right ones: hits, mean error, order, pairs, and what can be read.

This is how a generative reward model is measured: it writes a critique and a score, which is read from its text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.data.judging import Marks
from luthier.evals.exact_match import ExactMatch, said, wilson_interval
from luthier.evals.statistics import Difference, Floats, Ints, Measure, compare_means, compare_statistic, spearman

BETTER = "better answer scored higher"
READABLE = "score readable"
_NUMBER = r"(-?\d+(?:,\d{3})*(?:\.\d+)?)"
_OF = r"(?:\s*(?:/|out of)\s*\d+(?:\.\d+)?)?"
_ANY_NUMBER = re.compile(r"(?<![\w.])" + _NUMBER + _OF)
_NAMED = r"(?:score|rating|reward|grade|answer|result)(?:\s+(?:is|of))?\W*?"
_LABEL = rf"\W*(?:(?:final|overall|the)\s+)*{_NAMED}"
_BARE_SCORE = re.compile(rf"\W*?{_NUMBER}{_OF}\W*")
_LABELLED_SCORE = re.compile(rf"(?:{_LABEL}|.*\\boxed\{{){_NUMBER}{_OF}(?:\W*|\W*</\w+>\W*)", re.I)
_SAID_SCORE = re.compile(rf"(?:\b{_NAMED}|\\boxed\{{){_NUMBER}", re.I)


def is_score(reference: str) -> bool:
    """Whether a reference comes down to a number: alone, or behind a word such as `score` in its last line."""
    lines = [line for line in said(reference).splitlines() if line.strip()]
    return bool(lines) and (_is_bare(reference) or _LABELLED_SCORE.fullmatch(lines[-1].strip()) is not None)


def _is_bare(answer: str) -> bool:
    return _BARE_SCORE.fullmatch(said(answer)) is not None


def find_score(answer: str) -> float:
    """The last number that an answer says, `7 out of 10` being 7; NaN where it says none."""
    return _last(_ANY_NUMBER.findall(said(answer)))


def find_labelled_score(answer: str) -> float:
    """The number alone, or the last behind a word such as `score`; NaN where there is none, whatever else it counts."""
    return find_score(answer) if _is_bare(answer) else _last(_SAID_SCORE.findall(said(answer)))


def _last(found: list[str]) -> float:
    return float(found[-1].replace(",", "")) if found else math.nan


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores that one model says, beside the right ones; NaN where none can be read."""

    right: Floats
    said: Floats
    known: Ints
    """Rows whose right score is known; of the others only the order is."""
    groups: tuple[Ints, ...]
    """Rows with the same prompt, where their right scores differ."""

    @property
    def readable(self) -> Floats:
        """1 for each answer that says a score."""
        return np.asarray(~np.isnan(self.said), float)

    @property
    def hits(self) -> Floats:
        """1 for each known score that is said exactly."""
        return np.asarray(self.said == self.right, float)[self.known]

    @property
    def errors(self) -> Floats:
        """How far off each known score is: at most by the whole range, which is also the price of saying none."""
        right = self.right[self.known]
        widest = max(float(np.ptp(right)), 1.0)
        off = np.nan_to_num(np.abs(self.said[self.known] - right), nan=widest)
        return np.asarray(np.minimum(off, widest))

    @property
    def filled(self) -> Floats:
        """Known rows' scores for their order; where none is said, that of the middle."""
        said = self.said[self.known]
        return np.where(np.isnan(said), np.median(self.right[self.known]), said)

    @property
    def order(self) -> float:
        """Spearman's correlation with the right scores."""
        return spearman(self.filled, self.right[self.known])

    @property
    def agreements(self) -> Floats:
        """For each prompt, in what share of its pairs the better answer gets the higher score; a tie is not higher."""
        return np.array([self._agreement(rows) for rows in self.groups])

    def _agreement(self, rows: Ints) -> float:
        right, given = self.right[rows], self.said[rows]
        better = right[:, None] > right[None]
        return float((given[:, None] > given[None])[better].mean())

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        facts: dict[str, Any] = {"rows": len(self.said), "readable": self.readable.mean().item()}
        if len(self.known):
            hits = int(self.hits.sum())
            facts |= {
                "known": len(self.known),
                "right": hits,
                "accuracy": hits / len(self.known),
                "interval_95": list(wilson_interval(hits, len(self.known))),
                "error": self.errors.mean().item(),
                "spearman": self.order,
            }
        if self.groups:
            facts |= {"prompts": len(self.groups), "better_higher": self.agreements.mean().item()}
        return facts


def read_scores(references: Sequence[str], answers: Sequence[str], marks: Sequence[Marks] | None = None) -> Scores:
    """The scores of a model's answers; behind a label where all references have one."""
    find = find_score if any(map(_is_bare, references)) else find_labelled_score
    right = np.array([find(text) for text in references])
    known = [number for number, each in enumerate(marks or ()) if each.is_score_known]
    return Scores(
        right,
        np.array([find(text) for text in answers]),
        np.array(known if marks is not None else range(len(right)), int),
        _group(right, marks or ()),
    )


def find_scores(exact: ExactMatch, marks: Sequence[Marks] | None = None) -> Scores | None:
    """The scores among greedy answers to held-out rows; None where what the rows say is no score."""
    references = [each.question.answer for each in exact.answers]
    if not (references and all(map(is_score, references))):
        return None
    return read_scores(references, [each.got for each in exact.answers], marks)


def _group(right: Floats, marks: Sequence[Marks]) -> tuple[Ints, ...]:
    members: dict[str, list[int]] = {}
    for number, each in enumerate(marks):
        if each.prompt_id:
            members.setdefault(each.prompt_id, []).append(number)
    return tuple(np.array(rows) for rows in members.values() if np.ptp(right[rows]) > 0)


def measure_scores(
    references: Sequence[str],
    answers: tuple[Sequence[str], Sequence[str]],
    marks: Sequence[Marks] | None = None,
    *,
    seed: int = 0,
) -> list[Measure]:
    """How well the scores of base and tuned agree with the right ones."""
    base, tuned = (read_scores(references, each, marks) for each in answers)
    found: list[Measure] = []
    if len(base.known):
        found.append(_compare("score accuracy", base.hits, tuned.hits, seed=seed))
        found.append(_compare("score error", base.errors, tuned.errors, is_higher_better=False, seed=seed))
        if len(np.unique(base.right[base.known])) > 1:
            found.append(
                Measure("score order (Spearman)", base.filled, tuned.filled, _compare_order(base, tuned, seed))
            )
    if base.groups:
        found.append(_compare(BETTER, base.agreements, tuned.agreements, seed=seed))
    found.append(_compare(READABLE, base.readable, tuned.readable, seed=seed))
    return found


def _compare(name: str, base: Floats, tuned: Floats, *, is_higher_better: bool = True, seed: int) -> Measure:
    return Measure(name, base, tuned, compare_means(base, tuned, is_higher_better=is_higher_better, seed=seed))


def _compare_order(base: Scores, tuned: Scores, seed: int) -> Difference:
    """Rows are won by the smaller error, because order is nothing that one row has."""
    right = base.right[base.known]

    def order(values: Floats, drawn: Ints) -> float:
        return spearman(values[drawn], right[drawn])

    measured = compare_statistic(base.filled, tuned.filled, order, seed=seed)
    near = compare_means(base.errors, tuned.errors, is_higher_better=False, seed=seed)
    return Difference(measured.base, measured.tuned, measured.low, measured.high, near.wins, near.ties, near.losses)
