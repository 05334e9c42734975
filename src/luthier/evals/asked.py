"""What two models are asked, as each of them meets it: prompts in tokens, and the rows whose likelihood is measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.example import Conversation, Example, Message, Preference, Text
from luthier.data.hashes import content_hash, prompt_hash
from luthier.data.judging import Marks, read_marks
from luthier.data.prompts import Prompt
from luthier.data.reasons import RowError, list_counts
from luthier.data.rows import ReadOptions, RowReader
from luthier.data.source import Row, Source
from luthier.data.tokens import ModelText
from luthier.engines.chat import find_end
from luthier.engines.verbs import Bools
from luthier.errors import DataError, MaskError
from luthier.evals.heldout import Place, list_rows

_PROMPTS = "prompt"


@dataclass(frozen=True, eq=False)
class Scored:
    """Tokens of a text, and which of them count when its likelihood is measured."""

    ids: list[int]
    counted: Bools

    @property
    def tokens(self) -> int:
        """How many count."""
        return int(self.counted.sum())


@dataclass(frozen=True, eq=False)
class Asked:
    """One row or prompt; a plain text is not asked, only measured."""

    place: Place
    messages: list[Message]
    prompt: str
    reference: str | None
    texts: tuple[Scored, ...]
    """What the row says itself; of a pair, the preferred conversation and the other one."""
    content: int
    asks: int
    """Hash of what the person says in it."""
    ids: list[int] = field(default_factory=list)
    marks: Marks = field(default_factory=Marks)

    @property
    def is_asked(self) -> bool:
        """Whether it waits for an answer."""
        return bool(self.prompt)


@dataclass(frozen=True)
class Reading:
    """Everything that one model is asked, and how its answers are read."""

    text: ModelText
    reader: RowReader
    asked: list[Asked]
    stops: tuple[int, ...]
    left_out: dict[str, int] = field(default_factory=dict)

    def only(self, places: Collection[Place]) -> Reading:
        """Those in some places."""
        return replace(self, asked=[each for each in self.asked if each.place in places])

    def decode(self, drawn: Sequence[Sequence[int]]) -> list[str]:
        """What a model said."""
        texts = self.text.tokenizer.decode_batch([list(each) for each in drawn], skip_special_tokens=False)
        return [self.reader.answer(text) for text in texts]


@dataclass(frozen=True)
class AskedRows:
    """Rows of a source, or those of some places."""

    source: Source
    only: Collection[Place] | None = None
    limit: int | None = None


def read_asked(options: ReadOptions, rows: AskedRows | Sequence[Prompt]) -> Reading:
    """The rows or prompts as one model meets them; raises DataError when none can be used."""
    assert options.model_folder is not None
    text = ModelText(options.model_folder, chat_template=options.chat_template)
    names = rows.source.names if isinstance(rows, AskedRows) else (_PROMPTS,)
    reader = RowReader(options, names)
    left_out: dict[str, int] = {}
    found: list[Asked] = []
    ends = {find_end(reader)}
    for place, make in _list_makers(text, reader, rows, ends):
        try:
            found.append(make(place))
        except RowError as error:
            left_out[error.reason] = left_out.get(error.reason, 0) + 1
        except MaskError as error:
            left_out[error.code] = left_out.get(error.code, 0) + 1
    if not found:
        raise DataError(
            f"{', '.join(names)}: nothing can be asked ({list_counts(left_out) or 'there is nothing'})",
            hint="`luthier data check` names the bad rows",
        )
    ids = text.tokenizer.encode_batch_fast([each.prompt for each in found], add_special_tokens=False)
    found = [replace(each, ids=tokens.ids) for each, tokens in zip(found, ids, strict=True)]
    return Reading(text, reader, found, text.end_tokens(ends), left_out)


def _list_makers(text: ModelText, reader: RowReader, rows: AskedRows | Sequence[Prompt], ends: set[str]) -> Any:
    if isinstance(rows, AskedRows):
        for place, row in islice(list_rows(rows.source, rows.only), rows.limit):
            yield place, lambda where, row=row: _of_row(reader, where, row, ends)
    else:
        for number, prompt in enumerate(rows, 1):
            yield (_PROMPTS, number), lambda where, prompt=prompt: _of_prompt(text, reader, where, prompt)


def _of_prompt(text: ModelText, reader: RowReader, place: Place, prompt: Prompt) -> Asked:
    example = Conversation(prompt.messages)
    if text.template_source:
        shown = reader.prompt(prompt.messages)
    else:
        # A model that knows no turns is asked to go on with the text.
        shown = text.text_prefix + "\n".join(message["content"] for message in prompt.messages)
    return Asked(place, prompt.messages, shown, prompt.reference, (), content_hash(example), prompt_hash(example))


def _of_row(reader: RowReader, place: Place, row: Row, ends: set[str]) -> Asked:
    example = reader.example(row)
    hashes = content_hash(example), prompt_hash(example)
    texts = _read_texts(reader, row)
    if isinstance(example, Text):
        return Asked(place, [], "", None, texts, *hashes)
    question = reader.question(row)
    ends.add(question.end)
    return Asked(place, _messages_of(example), question.prompt, question.answer, texts, *hashes, marks=read_marks(row))


def _messages_of(example: Example) -> list[Message]:
    if isinstance(example, Preference):
        return [*example.prompt, *example.chosen[:-1]]
    assert isinstance(example, Conversation)
    return example.messages[:-1]


def _read_texts(reader: RowReader, row: Row) -> tuple[Scored, ...]:
    """The row's first example as tokens, cut where training would cut it, with what training would train."""
    sequences = reader.sequences(row)[0]
    encoded, ranges = reader.encode(sequences)
    found = []
    for number, own in enumerate(ranges):
        start, stop = encoded.offsets[number : number + 2].tolist()
        stop = min(stop, start + reader.data.max_length)
        counted = np.zeros(stop - start, bool)
        for first, last in own.tolist():
            counted[first:last] = True
        counted[:1] = False  # nothing foretells the first token
        found.append(Scored(encoded.ids[start:stop].tolist(), counted))
    return tuple(found)


def read_plain(text: ModelText, texts: Sequence[str], *, max_length: int) -> list[Scored]:
    """Plain texts in pieces of at most so many tokens, every token but the first of each counted."""
    encoded = text.tokenizer.encode_batch_fast(
        [f"{text.text_prefix}{each}" for each in texts], add_special_tokens=False
    )
    pieces = [each.ids[at : at + max_length] for each in encoded for at in range(0, len(each.ids), max_length)]
    return [Scored(ids, np.arange(len(ids)) > 0) for ids in pieces if len(ids) > 1]


def options_for(folder: Path, template: Path | None, data: Any) -> ReadOptions:
    """How rows are read to be asked: whatever their kind, and with the model's own tokenizer."""
    return ReadOptions(data, None, folder, template, learn_shapes=False, fast_tokenizer=False)
