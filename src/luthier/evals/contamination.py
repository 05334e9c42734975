"""Contamination: which of the rows that a model is measured by it was trained on, by its runs' own ledgers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import orjson

from luthier.data.example import Conversation, Example, Preference
from luthier.data.hashes import content_hash, hash_bytes, prompt_hash
from luthier.data.reasons import RowError
from luthier.data.rows import ReadOptions, RowReader
from luthier.data.source import open_source
from luthier.errors import LuthierError
from luthier.evals.exact_match import said
from luthier.evals.heldout import list_rows
from luthier.runs.layout import LEDGER
from luthier.runs.models import find_model
from luthier.runs.run import Run, open_run

_MOST_RUNS = 16


@dataclass
class Overlap:
    """What was looked for and found among the rows that were trained; `notes` say where one could not look."""

    rows: int = 0
    contents: set[int] = field(default_factory=set)
    prompts: set[int] = field(default_factory=set)
    answers: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def answer_hash(text: str) -> int:
    """Equal for answers of the same words in the same case."""
    return hash_bytes(" ".join(said(text).split()).encode())


def find_overlap(
    run: Run | None, contents: Collection[int], prompts: Collection[int], answers: Collection[int]
) -> Overlap:
    """Look for hashes among the training rows of a run and of the runs it started from."""
    found = Overlap()
    if run is None:
        found.notes.append("what the model was trained on is not known here, so nothing was looked for in it")
    for each in _list_runs(run):
        try:
            _look_through(each, found, (frozenset(contents), frozenset(prompts), frozenset(answers)))
        except (LuthierError, OSError) as error:
            found.notes.append(f"the training rows of {each.id} cannot be read again: {error}")
    return found


def _list_runs(run: Run | None) -> Iterator[Run]:
    """The run, and the runs behind its base, while their folders are there."""
    for _ in range(_MOST_RUNS):
        if run is None:
            return
        yield run
        base = run.spec.model.base
        entry = find_model(base) if base.startswith("ft:") or "/" not in base else None
        run = open_run(entry.id) if entry and entry.is_there else None


def _look_through(run: Run, found: Overlap, wanted: tuple[frozenset[int], frozenset[int], frozenset[int]]) -> None:
    data = run.spec.data
    if data.train is None or data.train == "-":
        found.notes.append(f"the training rows of {run.id} came from standard input and are gone")
        return
    contents, prompts, answers = wanted
    with (run.folder / LEDGER).open("rb") as lines:
        entries = (orjson.loads(line) for line in lines)
        trained = {(entry["file"], entry["line"]) for entry in entries if entry["place"] == "train"}
    with open_source(data.train) as source:
        reader = RowReader(ReadOptions(data), source.names)
        seen = 0
        for _, row in list_rows(source, trained):
            try:
                example = reader.example(row)
            except RowError:
                continue
            seen += 1
            found.contents |= {content_hash(example)} & contents
            found.prompts |= {prompt_hash(example)} & prompts
            found.answers |= {answer_hash(text) for text in _answers_of(example)} & answers if answers else set()
    found.rows += seen
    if seen != len(trained):
        found.notes.append(f"{run.id} trained {len(trained):,} rows, of which {seen:,} are still in its source")


def _answers_of(example: Example) -> Iterator[str]:
    if isinstance(example, Conversation | Preference):
        messages = example.messages if isinstance(example, Conversation) else example.chosen
        yield from (message["content"] for message in messages if message["role"] == "assistant" and message["content"])
