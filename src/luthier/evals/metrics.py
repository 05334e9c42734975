"""What a single answer is worth: equal to the reference, of the asked form, near the right number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from luthier.data.judging import Marks
from luthier.evals.exact_match import said
from luthier.evals.schema import is_valid
from luthier.evals.scores import is_score, measure_scores
from luthier.evals.statistics import Difference, Floats, Measure, compare_means

_REFUSAL = re.compile(
    r"\W*(?:(?:i'?m|i am)\s+(?:very\s+|really\s+)?(?:sorry|afraid|unable)|sorry\b|i\s+apologi[sz]e"
    r"|i\s+(?:can'?t|cannot|can not|won'?t|will not|could not|couldn'?t)\s+(?:\w+\s+)?"
    r"(?:help|assist|answer|provide|do|comply|fulfil|fulfill|discuss|create|write|generate)"
    r"|as an? (?:ai|language model|artificial)|unfortunately,? i (?:can'?t|cannot|am unable))",
    re.I,
)
# A reference longer than this is prose, which nobody repeats to the letter.
_PROSE_CHARACTERS = 100


@dataclass(frozen=True)
class Checks:
    """What a person says of every good answer."""

    pattern: re.Pattern[str] | None = None
    schema: dict[str, Any] | None = None


def is_same(answer: str, reference: str) -> bool:
    """Equal but for thoughts and white space at the ends."""
    return said(answer) == said(reference)


def read_json_answer(answer: str) -> tuple[bool, Any]:
    """Whether an answer is JSON and nothing else, and its value."""
    try:
        return True, orjson.loads(said(answer))
    except ValueError:
        return False, None


def is_json_table(text: str) -> bool:
    """Whether a reference is a JSON object or list."""
    return isinstance(read_json_answer(text)[1], dict | list)


def is_refusal(answer: str) -> bool:
    """Whether an answer begins as refusals in English do."""
    return _REFUSAL.match(said(answer)) is not None


def count_words(answer: str) -> int:
    """Words of an answer without its thoughts."""
    return len(said(answer).split())


def measure_answers(
    references: Sequence[str | None],
    answers: tuple[Sequence[str], Sequence[str]],
    checks: Checks,
    marks: Sequence[Marks] | None = None,
    *,
    seed: int = 0,
) -> list[Measure]:
    """Every metric that these answers (of base and tuned) can be measured by, the most telling first."""
    known = [text for text in references if text is not None]
    is_known = len(known) == len(references) > 0
    found: list[Measure] = []
    if is_known and all(map(is_score, known)):
        found += measure_scores(known, answers, marks, seed=seed)
    elif is_known and (exact := _measure_exact(known, answers, seed)) is not None:
        found.append(exact)
    if checks.pattern is not None:
        found.append(_shares("matches the pattern", answers, lambda text: bool(_matches(checks, text)), seed))
    if checks.schema is not None:
        found.append(_shares("valid by the JSON schema", answers, lambda text: _fits(checks, text), seed))
    elif is_known and all(map(is_json_table, known)):
        found.append(_shares("valid JSON", answers, is_json_table, seed))
    return found


def measure_drift(answers: tuple[Sequence[str], Sequence[str]], *, seed: int = 0) -> dict[str, Any]:
    """How answers changed where no direction is better: their length, and how many refuse."""
    words = _of_both(answers, count_words)
    refusals = _of_both(answers, is_refusal)
    return {
        "words": _told(compare_means(*words, seed=seed), "longer", "shorter"),
        "refusals": _told(compare_means(*refusals, seed=seed), "more", "fewer"),
    }


def _measure_exact(
    references: Sequence[str], answers: tuple[Sequence[str], Sequence[str]], seed: int
) -> Measure | None:
    """Exact match; None for prose that neither model repeats."""
    base, tuned = (np.array([is_same(*pair) for pair in zip(each, references, strict=True)], float) for each in answers)
    is_prose = float(np.median([len(said(text)) for text in references])) > _PROSE_CHARACTERS
    if is_prose and not (base.any() or tuned.any()):
        return None
    return Measure("exact match", base, tuned, compare_means(base, tuned, seed=seed))


def _shares(name: str, answers: tuple[Sequence[str], Sequence[str]], is_good: Any, seed: int) -> Measure:
    base, tuned = _of_both(answers, is_good)
    return Measure(name, base, tuned, compare_means(base, tuned, seed=seed))


def _of_both(answers: tuple[Sequence[str], Sequence[str]], value: Any) -> tuple[Floats, Floats]:
    base, tuned = (np.array([value(text) for text in each], float) for each in answers)
    return base, tuned


def _matches(checks: Checks, text: str) -> bool:
    assert checks.pattern is not None
    return checks.pattern.search(said(text)) is not None


def _fits(checks: Checks, text: str) -> bool:
    is_json, value = read_json_answer(text)
    return is_json and is_valid(value, checks.schema)


def _told(found: Difference, more: str, less: str) -> dict[str, Any]:
    """A difference that is neither better nor worse."""
    facts = found.as_dict()
    del facts["better"]
    counts = {"more": facts.pop("wins"), "equal": facts.pop("ties"), "fewer": facts.pop("losses")}
    word = (more if found.low > 0 else less) if found.is_detected else "no detectable difference"
    return {**facts, **counts, "verdict": word}
