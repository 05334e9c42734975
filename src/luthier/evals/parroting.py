"""Parroting: answers that repeat a training answer to the letter where something else would have been right."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from luthier.evals.contamination import answer_hash
from luthier.evals.exact_match import said
from luthier.evals.metrics import is_same

# Shorter answers ("yes", "42") coincide without anybody repeating anything.
FEWEST_CHARACTERS = 24


def could_repeat(answer: str, reference: str | None) -> bool:
    """Whether an answer is long enough to be told apart, and not simply right."""
    is_right = reference is not None and is_same(answer, reference)
    return len(said(answer)) >= FEWEST_CHARACTERS and not is_right


def list_hashes(answers: Sequence[str], references: Sequence[str | None]) -> set[int]:
    """What to look for among the training answers."""
    pairs = zip(answers, references, strict=True)
    return {answer_hash(answer) for answer, reference in pairs if could_repeat(answer, reference)}


def list_repeats(answers: Sequence[str], references: Sequence[str | None], trained: Collection[int]) -> list[int]:
    """Numbers of the answers that stand among the training answers."""
    return [
        number
        for number, (answer, reference) in enumerate(zip(answers, references, strict=True))
        if could_repeat(answer, reference) and answer_hash(answer) in trained
    ]
