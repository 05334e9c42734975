"""Held-out rows as one model meets them: conversations as questions, plain texts as tokens to predict."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import orjson

from luthier.data.example import Text
from luthier.data.reasons import RowError, list_counts
from luthier.data.render import Question
from luthier.data.rows import ReadOptions, RowReader
from luthier.data.source import Row, Source
from luthier.data.tokens import ModelText
from luthier.errors import DataError

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

    def stop_tokens(self) -> tuple[int, ...]:
        """What ends an answer: the ends of the turns as rendered, and what the model's folder says."""
        named = {question.end for _, question in self.questions} | {self.text.eos_token}
        found = {self.text.tokenizer.token_to_id(token) for token in named if token} | _configured(self.text.folder)
        return tuple(sorted(token for token in found if token is not None))

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
    for place, row in islice(_rows(source, only), limit):
        try:
            if isinstance(found.reader.example(row), Text):
                texts.append(found.reader.sequences(row)[0][0].text)
            else:
                found.questions.append((place, found.reader.question(row)))
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


def _rows(source: Source, only: Collection[Place] | None) -> Iterator[tuple[Place, Row]]:
    for block in source.blocks():
        for line, row in zip(block.lines, block.rows, strict=True):
            place = source.names[block.file], line
            if only is None or place in only:
                yield place, row


def _configured(folder: Path) -> set[int | None]:
    """End tokens by the model's own generation settings."""
    path = folder / "generation_config.json"
    facts = orjson.loads(path.read_bytes()) if path.is_file() else {}
    named = facts.get("eos_token_id")
    return set(named if isinstance(named, list) else [named])
