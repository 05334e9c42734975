"""One block of raw rows in, all that is known of each row out: the part of preparation that can run in parallel.

A RowReader holds no state that decides a result, so blocks can be read by any process in any order.
"""

from __future__ import annotations

import base64
import difflib
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from luthier.data.check import check_example, check_json
from luthier.data.example import Conversation, Example, Message, Preference, Text
from luthier.data.formats import find_format, get_format
from luthier.data.hashes import content_hash, hash_bytes, prompt_hash
from luthier.data.notes import END_CUT, NOTES, SPLIT, TRUNCATED
from luthier.data.parse import check_parsed, parse_line
from luthier.data.reasons import REASON_CODES, RowError
from luthier.data.render import Question, Renderer, Sequence
from luthier.data.source import Block, Row
from luthier.data.tokens import Encoded, Encoder, Ids, ModelText
from luthier.errors import MaskError
from luthier.spec.data import Data

NOTE_BITS = {name: 1 << bit for bit, name in enumerate(NOTES)}
KINDS = ("conversation", "preference", "text")
_OBJECTIVE_KINDS = {
    "sft": "conversation",
    "pretrain": "text",
    "dpo": "preference",
    "simpo": "preference",
    "orpo": "preference",
}


@dataclass(frozen=True)
class ReadOptions:
    """Everything that decides how a row is read; plain values, so that it travels to other processes."""

    data: Data
    objective: str | None = None
    model_folder: Path | None = None
    chat_template: Path | None = None
    learn_shapes: bool = True
    fast_tokenizer: bool = True


@dataclass(slots=True)
class Stop:
    """A row that must not start training: its tokens cannot be told, or it trains nothing."""

    line: int
    message: str
    hint: str


@dataclass(slots=True)
class RowBatch:
    """Columns of a block's rows, and the tokens of its examples end to end."""

    file: int
    lines: npt.NDArray[np.uint32]
    reasons: npt.NDArray[np.uint8]
    kinds: npt.NDArray[np.uint8]
    notes: npt.NDArray[np.uint8]
    contents: npt.NDArray[np.uint64]
    prompts: npt.NDArray[np.uint64]
    groups: npt.NDArray[np.uint64]
    examples_of_row: npt.NDArray[np.uint32]
    sequences_of_example: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.uint32]
    ids: npt.NDArray[np.uint32]
    ranges_of_sequence: npt.NDArray[np.uint32]
    ranges: npt.NDArray[np.uint32]
    rejected: list[dict[str, Any]]
    stops: list[Stop]
    formats: dict[str, int]
    read_bytes: int
    tokenizer: str


@dataclass(slots=True)
class _Draft:
    """A block while it is read."""

    reasons: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    notes: list[int] = field(default_factory=list)
    hashes: list[tuple[int, int, int]] = field(default_factory=list)
    examples_of_row: list[int] = field(default_factory=list)
    parts: list[list[Sequence]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)


class RowReader:
    """Reads blocks by one set of options; made once in each process."""

    def __init__(self, options: ReadOptions, names: tuple[str, ...]) -> None:
        self._names = names
        self.data = options.data
        self._format = get_format(options.data.format)
        self._kind = _OBJECTIVE_KINDS[options.objective] if options.objective else None
        self._objective = options.objective
        self._renderer: Renderer | None = None
        self._encoder: Encoder | None = None
        if options.model_folder is not None:
            text = ModelText(options.model_folder, chat_template=options.chat_template)
            self._renderer = _build_renderer(text, options)
            self._encoder = Encoder(text, fast=options.fast_tokenizer)

    def read(self, block: Block) -> RowBatch:
        """Everything known of the block's rows."""
        draft = _Draft()
        for line, row in zip(block.lines, block.rows, strict=True):
            try:
                self._read_row(draft, line, row)
            except RowError as error:
                self._reject(draft, block.file, line, row, error)
        return self._columns(block, draft)

    def example(self, row: Row) -> Example:
        """One row as a checked Example; raises RowError."""
        return self._checked(row)[1]

    def sequences(self, row: Row) -> list[list[Sequence]]:
        """The texts and spans of one row, for showing; raises RowError or MaskError."""
        assert self._renderer is not None
        return self._renderer.render(self._checked(row)[1])

    def question(self, row: Row) -> Question:
        """The row's last assistant turn as a question, of a pair the preferred one; raises RowError or MaskError."""
        assert self._renderer is not None
        example = self._checked(row)[1]
        if isinstance(example, Text):
            raise RowError("wrong_kind", "a plain text asks nothing that could be answered")
        if isinstance(example, Preference):
            example = Conversation([*example.prompt, *example.chosen], example.tools)
        return self._renderer.render_question(example)

    def prompt(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """A conversation that waits for its answer, as the model is shown it; raises RowError."""
        assert self._renderer is not None
        return self._renderer.render_prompt(messages, tools)

    def answer(self, text: str) -> str:
        """What a model said, without control tokens behind it."""
        assert self._renderer is not None
        return self._renderer.split_end(text)[0]

    def encode(self, sequences: list[Sequence]) -> tuple[Encoded, list[npt.NDArray[np.uint32]]]:
        """Ids and trained ranges of sequences, for showing."""
        assert self._encoder is not None
        return self._encoder.encode([s.text for s in sequences], [s.spans for s in sequences])

    def _checked(self, row: Row) -> tuple[dict[str, Any], Example, str]:
        if isinstance(row, RowError):
            raise row
        if isinstance(row, bytes):
            parsed = parse_line(row)
        else:
            check_parsed(row)
            parsed = row
        form = self._format or find_format(parsed)
        example = form.read(parsed)
        check_example(example)
        if not isinstance(row, bytes):
            check_json(example)
        if self._kind is not None and example.kind != self._kind:
            raise RowError("wrong_kind", f'objective "{self._objective}" trains a {self._kind}, found a {example.kind}')
        return parsed, example, form.NAME

    def _read_row(self, draft: _Draft, line: int, row: Row) -> None:
        parsed, example, name = self._checked(row)
        group = self._group(parsed)
        parts: list[list[Sequence]] = []
        if self._renderer is not None:
            try:
                parts = self._renderer.render(example)
            except MaskError as error:
                draft.stops.append(Stop(line, error.message, error.hint))
        bits = 0
        for part in parts:
            for sequence in part:
                for note in sequence.notes:
                    bits |= NOTE_BITS[note]
        draft.formats[name] = draft.formats.get(name, 0) + 1
        draft.reasons.append(0)
        draft.kinds.append(KINDS.index(example.kind))
        draft.notes.append(bits)
        draft.hashes.append((content_hash(example), prompt_hash(example), group))
        draft.examples_of_row.append(len(parts))
        draft.parts += parts

    def _group(self, row: dict[str, Any]) -> int:
        if self.data.group_by is None:
            return 0
        if self.data.group_by not in row:
            close = difflib.get_close_matches(self.data.group_by, row, 1)
            nearest = f"; did you mean `{close[0]}`?" if close else ""
            raise RowError("missing_key", f"`{self.data.group_by}` is missing, by which rows are grouped{nearest}")
        return hash_bytes(orjson.dumps(row[self.data.group_by], default=str, option=orjson.OPT_SORT_KEYS))

    def _reject(self, draft: _Draft, file: int, line: int, row: Row, error: RowError) -> None:
        draft.reasons.append(REASON_CODES[error.reason])
        draft.kinds.append(0)
        draft.notes.append(0)
        draft.hashes.append((0, 0, 0))
        draft.examples_of_row.append(0)
        draft.rejected.append(self.rejected(file, line, row, error))

    def rejected(self, file: int, line: int, row: Row, error: RowError) -> dict[str, Any]:
        """An entry of rejected.jsonl: the place, the reason, and the row as it came."""
        return describe_rejected(self._names[file], line, row, error)

    def _columns(self, block: Block, draft: _Draft) -> RowBatch:
        sequences = [sequence for part in draft.parts for sequence in part]
        encoded = Encoded(np.zeros(0, np.uint32), np.zeros(1, np.int64))
        ranges: list[npt.NDArray[np.uint32]] = []
        if self._encoder is not None:
            encoded, ranges = self.encode(sequences)
        ids, lengths = encoded.ids, np.diff(encoded.offsets).astype(np.uint32)
        sequences_of_example = np.array([len(part) for part in draft.parts], np.uint8)
        if self.data.too_long == "truncate":
            ids, lengths, ranges = self._truncate(draft, encoded, ranges, sequences_of_example)
        if (sequences_of_example == 2).any():
            self._refuse_equal_pairs(block, draft, ids, lengths)
        if self.data.too_long == "split":
            lengths, ranges, sequences_of_example = self._split(draft, lengths, ranges, sequences_of_example)
        hashes = np.array(draft.hashes, np.uint64).reshape(-1, 3)
        return RowBatch(
            file=block.file,
            lines=np.array(block.lines, np.uint32),
            reasons=np.array(draft.reasons, np.uint8),
            kinds=np.array(draft.kinds, np.uint8),
            notes=np.array(draft.notes, np.uint8),
            contents=hashes[:, 0].copy(),
            prompts=hashes[:, 1].copy(),
            groups=hashes[:, 2].copy(),
            examples_of_row=np.array(draft.examples_of_row, np.uint32),
            sequences_of_example=sequences_of_example,
            lengths=lengths,
            ids=ids,
            ranges_of_sequence=np.array([len(own) for own in ranges], np.uint32),
            ranges=np.concatenate([np.zeros((0, 2), np.uint32), *ranges]),
            rejected=draft.rejected,
            stops=draft.stops,
            formats=draft.formats,
            read_bytes=block.read_bytes,
            tokenizer=self._encoder.name if self._encoder else "",
        )

    def _refuse_equal_pairs(self, block: Block, draft: _Draft, ids: Ids, lengths: npt.NDArray[np.uint32]) -> None:
        """Two answers may differ in the row and not in the tokens, when thinking is dropped or the end cut off."""
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        rows = np.repeat(np.arange(len(draft.examples_of_row)), draft.examples_of_row)
        first = 0
        for row, part in zip(rows.tolist(), draft.parts, strict=True):
            if len(part) == 2:
                left, middle, right = offsets[first : first + 3]
                if np.array_equal(ids[left:middle], ids[middle:right]):
                    error = RowError("chosen_equals_rejected", "both answers come to the same tokens")
                    draft.reasons[row] = REASON_CODES[error.reason]
                    draft.rejected.append(self.rejected(block.file, block.lines[row], block.rows[row], error))
            first += len(part)
        draft.rejected.sort(key=lambda entry: int(entry["line"]))

    def _truncate(
        self,
        draft: _Draft,
        encoded: Encoded,
        ranges: list[npt.NDArray[np.uint32]],
        per_example: npt.NDArray[np.uint8],
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32], list[npt.NDArray[np.uint32]]]:
        """Cut each sequence at max_length, and its trained ranges with it."""
        limit = self.data.max_length
        full = np.diff(encoded.offsets)
        if not (full > limit).any():
            return encoded.ids, full.astype(np.uint32), ranges
        position = np.arange(len(encoded.ids)) - np.repeat(encoded.offsets[:-1], full)
        cut = [own[own[:, 0] < limit].clip(max=limit) for own in ranges]
        rows = np.repeat(np.arange(len(draft.examples_of_row)), draft.examples_of_row)
        rows_of_sequence = rows[np.repeat(np.arange(len(per_example)), per_example)]
        ends_kept = np.array([(own[:, 1] <= limit).any() for own in ranges])
        for row in np.unique(rows_of_sequence[full > limit]):
            draft.notes[row] |= NOTE_BITS[TRUNCATED]
            if draft.kinds[row] != KINDS.index("text") and not ends_kept[rows_of_sequence == row].any():
                draft.notes[row] |= NOTE_BITS[END_CUT]
        return encoded.ids[position < limit], np.minimum(full, limit).astype(np.uint32), cut

    def _split(
        self,
        draft: _Draft,
        lengths: npt.NDArray[np.uint32],
        ranges: list[npt.NDArray[np.uint32]],
        per_example: npt.NDArray[np.uint8],
    ) -> tuple[npt.NDArray[np.uint32], list[npt.NDArray[np.uint32]], npt.NDArray[np.uint8]]:
        """Cut each plain text beyond max_length into equal pieces, each an example of the same row."""
        counts = per_example.tolist()
        rows = np.repeat(np.arange(len(draft.examples_of_row)), draft.examples_of_row).tolist()
        cut_lengths: list[int] = []
        cut_ranges: list[npt.NDArray[np.uint32]] = []
        cut_counts: list[int] = []
        first = 0
        for row, count in zip(rows, counts, strict=True):
            length = int(lengths[first])
            pieces = -(-length // self.data.max_length) if draft.kinds[row] == KINDS.index("text") else 1
            if pieces == 1:
                cut_lengths += lengths[first : first + count].tolist()
                cut_ranges += ranges[first : first + count]
                cut_counts.append(count)
            else:
                # Of one size, because a last piece of a few tokens would be trained without anything before it.
                edges = [length * number // pieces for number in range(pieces + 1)]
                cut_lengths += np.diff(edges).tolist()
                cut_ranges += [_within(ranges[first], *edge) for edge in pairwise(edges)]
                cut_counts += [count] * pieces
                draft.examples_of_row[row] += pieces - 1
                draft.notes[row] |= NOTE_BITS[SPLIT]
            first += count
        return np.array(cut_lengths, np.uint32), cut_ranges, np.array(cut_counts, np.uint8)


def _within(ranges: npt.NDArray[np.uint32], start: int, stop: int) -> npt.NDArray[np.uint32]:
    """The part of trained ranges inside a stretch, counted from its start."""
    cut = ranges.clip(start, stop) - np.uint32(start)
    return cut[cut[:, 0] < cut[:, 1]]


def _build_renderer(text: ModelText, options: ReadOptions) -> Renderer:
    return Renderer(
        text.build_template(),
        text.control_tokens,
        text.added_tokens,
        bos=text.text_prefix,
        eos=text.eos_token,
        train_on=options.data.train_on,
        spans=options.data.spans,
        unroll=options.data.unroll,
        learn=options.learn_shapes,
    )


def describe_rejected(name: str, line: int, row: Row, error: RowError) -> dict[str, Any]:
    """An entry of rejected.jsonl: the place, the reason, and the row as it came."""
    return {"file": name, "line": line, "reason": error.reason, "message": error.message} | _kept(row)


def _kept(row: Row) -> dict[str, Any]:
    """The bad row as it came: text where it is text, else base64."""
    if isinstance(row, RowError):
        return {"row": row.row} if row.row else {}
    if isinstance(row, dict):
        return {"row": orjson.dumps(row, default=str).decode()}
    try:
        return {"row": row.decode()}
    except UnicodeDecodeError:
        return {"row_base64": base64.b64encode(row).decode()}
