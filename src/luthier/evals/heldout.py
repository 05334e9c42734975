"""Held-out rows as one model meets them: conversations as questions, plain texts as tokens to predict."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from luthier.data.example import Text
from luthier.data.judging import Marks, read_marks
from luthier.data.reasons import RowError, list_counts
from luthier.data.render import Question
from luthier.data.rows import ReadOptions, RowReader
from luthier.data.source import Row, Source
from luthier.data.tokens import ModelText
from luthier.errors import CallError, DataError
from luthier.runs.resolve import ResolvedModel, find_run

Place = tuple[str, int]
"""File and line of a row."""


@dataclass(frozen=True)
class HeldOut:
    """Rows read for one model; those that cannot be used are counted by reason."""

    text: ModelText
    reader: RowReader
    questions: list[tuple[Place, Question]] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    marks: list[Marks] = field(default_factory=list)
    """Of each question, in their order."""

    def stop_tokens(self) -> tuple[int, ...]:
        """What ends an answer: the ends of the turns as rendered, and what the model's folder says."""
        return self.text.end_tokens({question.end for _, question in self.questions})

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that hold their control tokens already."""
        return [each.ids for each in self.text.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def read_held_out(
    options: ReadOptions, source: Source, *, limit: int | None = None, only: Collection[Place] | None = None
) -> HeldOut:
    """The source's rows, or `only` those in some places; raises DataError when none can be used."""
    assert options.model_folder is not None
    found = HeldOut(
        ModelText(options.model_folder, chat_template=options.chat_template), RowReader(options, source.names)
    )
    texts: list[str] = []
    for place, row in islice(list_rows(source, only), limit):
        try:
            if isinstance(found.reader.example(row), Text):
                texts.append(found.reader.sequences(row)[0][0].text)
            else:
                found.questions.append((place, found.reader.question(row)))
                found.marks.append(read_marks(row))
        except RowError as error:
            found.left_out[error.reason] = found.left_out.get(error.reason, 0) + 1
    found.texts.extend(found.encode(texts))
    if not (found.questions or found.texts):
        reasons = list_counts(found.left_out) or "there are none"
        raise DataError(
            f"{', '.join(source.names)}: no row can be used ({reasons})",
            hint="`luthier data check` names the bad ones",
        )
    return found


def list_rows(source: Source, only: Collection[Place] | None = None) -> Iterator[tuple[Place, Row]]:
    """The rows of a source with their places, or those `only` in some of them."""
    for block in source.blocks():
        for line, row in zip(block.lines, block.rows, strict=True):
            place = source.names[block.file], line
            if only is None or place in only:
                yield place, row


def find_rows(resolved: ResolvedModel, named: str | None) -> tuple[str, set[Place] | None]:
    """Where rows are that a model was not trained on, and which of them; None for all. Named ones, or its run's."""
    if named is not None:
        return named, None
    run = find_run(resolved)
    if run is None:
        raise CallError(f"{resolved.name} is no run, so it held no rows out", hint="name some rows: --data FILE")
    data = run.spec.data
    if isinstance(data.valid, str):
        return data.valid, None
    places = run.held_out_rows()
    if data.train is None or not places:
        raise CallError(f"{run.id} held no rows out", hint="name some rows: --data FILE")
    return data.train, places


def find_template(resolved: ResolvedModel, named: str | None) -> Path | None:
    """The chat template to ask by: the named one, or that of the model's run; None for the model's own."""
    run = find_run(resolved)
    found = named or (run.spec.model.chat_template if run else None)
    return Path(found) if found else None
