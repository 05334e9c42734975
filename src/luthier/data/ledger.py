"""The ledger: every input row in exactly one place, and counts that must add up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from luthier.data.notes import LEAK
from luthier.data.reasons import REASON_CODES, REASON_NAMES, REASONS
from luthier.data.rows import KINDS, NOTE_BITS, RowBatch
from luthier.errors import LedgerError

TRAIN, VALID, DROPPED = 0, 1, 2
PLACES = ("train", "valid", "dropped")
_STRETCH_ROWS = 1 << 14

_COLUMNS = {
    "files": np.uint32,
    "lines": np.uint32,
    "reasons": np.uint8,
    "kinds": np.uint8,
    "notes": np.uint8,
    "contents": np.uint64,
    "prompts": np.uint64,
    "groups": np.uint64,
    "examples": np.uint32,
    "tokens": np.uint32,
    "trained": np.uint32,
    "longest": np.uint32,
    "least_trained": np.uint32,
}


@dataclass
class RowTable:
    """Columns over all rows, some fifty bytes a row, so that a million rows fit easily."""

    parts: dict[str, list[npt.NDArray[Any]]] = field(default_factory=lambda: {name: [] for name in _COLUMNS})
    rows_read: int = 0

    def add(self, batch: RowBatch) -> None:
        """Take a batch's rows in."""
        per_sequence = _sum_by(batch.ranges[:, 1].astype(np.int64) - batch.ranges[:, 0], batch.ranges_of_sequence)
        sequences_of_row = _sum_by(batch.sequences_of_example, batch.examples_of_row)
        values = {
            "files": np.full(len(batch.lines), batch.file),
            "lines": batch.lines,
            "reasons": batch.reasons,
            "kinds": batch.kinds,
            "notes": batch.notes,
            "contents": batch.contents,
            "prompts": batch.prompts,
            "groups": batch.groups,
            "examples": batch.examples_of_row,
            "tokens": _sum_by(batch.lengths, sequences_of_row),
            "trained": _sum_by(per_sequence, sequences_of_row),
            "longest": _extreme_by(np.maximum, batch.lengths, sequences_of_row),
            "least_trained": _extreme_by(np.minimum, per_sequence, sequences_of_row),
        }
        for name, value in values.items():
            self.parts[name].append(np.asarray(value).astype(_COLUMNS[name]))
        self.rows_read += len(batch.lines)

    def column(self, name: str) -> npt.NDArray[Any]:
        """One column over all rows."""
        joined = np.concatenate([np.zeros(0, _COLUMNS[name]), *self.parts[name]])
        self.parts[name] = [joined]
        return joined


def _sum_by(values: npt.NDArray[Any], counts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Sums over neighbouring runs of values; an empty run sums to 0."""
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    ends = np.cumsum(counts, dtype=np.int64)
    return np.asarray(totals[ends] - totals[ends - counts])


def _extreme_by(pick: np.ufunc, values: npt.NDArray[Any], counts: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The largest or smallest of each run; 0 for an empty one."""
    found = np.zeros(len(counts), np.int64)
    filled = np.flatnonzero(counts)
    starts = (np.cumsum(counts, dtype=np.int64) - counts)[filled]
    if len(filled):
        found[filled] = pick.reduceat(values, starts)
    return found


def count_places(places: npt.NDArray[np.uint8], reasons: npt.NDArray[np.uint8], rows_read: int) -> dict[str, Any]:
    """Counts by place and by reason; raises LedgerError unless each row read is in exactly one place."""
    by_place = {name: int((places == code).sum()) for code, name in enumerate(PLACES)}
    by_reason = {REASON_NAMES[int(code)]: int((reasons == code).sum()) for code in np.unique(reasons) if code}
    if sum(by_place.values()) != rows_read or sum(by_reason.values()) != by_place["dropped"]:
        raise LedgerError(
            f"{rows_read} rows were read, and the ledger holds {by_place} and the reasons {by_reason}",
            hint="this is a bug of Luthier; nothing was trained",
        )
    return {"rows": rows_read, **by_place, "reasons": by_reason}


def count_malformed(by_reason: dict[str, int]) -> int:
    """Rows that are bad in themselves, not only duplicates or too long."""
    return sum(count for name, count in by_reason.items() if REASONS[name].is_malformed)


def ledger_lines(
    table: RowTable, places: npt.NDArray[np.uint8], names: tuple[str, ...], leaked: npt.NDArray[np.bool_]
) -> Iterator[bytes]:
    """One JSON line a row, in the order of the source."""
    quoted = [orjson.dumps(name).decode() for name in names]
    columns = [table.column(name) for name in ("files", "lines", "reasons", "tokens", "trained", "examples", "notes")]
    # A stretch at a time: a million rows as Python numbers would take more memory than all the columns.
    for start in range(0, len(places), _STRETCH_ROWS):
        stretch = slice(start, start + _STRETCH_ROWS)
        rows = zip(*(values[stretch].tolist() for values in (*columns, places, leaked)), strict=True)
        for file, line, reason, tokens, trained, examples, notes, place, leak in rows:
            text = f'{{"file":{quoted[file]},"line":{line},"place":"{PLACES[place]}"'
            if reason:
                text += f',"reason":"{REASON_NAMES[reason]}"'
            text += f',"tokens":{tokens},"trained_tokens":{trained}'
            if examples > 1:
                text += f',"examples":{examples}'
            if notes or leak:
                text += f',"notes":{_listed_notes(notes, leak)}'
            yield (text + "}\n").encode()


def _listed_notes(bits: int, leaked: bool) -> str:
    if leaked:
        bits |= NOTE_BITS[LEAK]
    return orjson.dumps([name for name, bit in NOTE_BITS.items() if bits & bit]).decode()


def count_kinds(table: RowTable, places: npt.NDArray[np.uint8]) -> dict[str, int]:
    """Usable rows of each kind."""
    kinds = table.column("kinds")[places != DROPPED]
    return {name: int((kinds == code).sum()) for code, name in enumerate(KINDS) if (kinds == code).any()}


def count_notes(table: RowTable, places: npt.NDArray[np.uint8]) -> dict[str, int]:
    """Usable rows with each note."""
    notes = table.column("notes")[places != DROPPED]
    return {name: int(((notes & bit) > 0).sum()) for name, bit in NOTE_BITS.items() if (notes & bit).any()}


def mark(reasons: npt.NDArray[np.uint8], rows: npt.NDArray[Any], name: str) -> None:
    """Give the rows a reason, where they have none yet."""
    free = rows[reasons[rows] == 0]
    reasons[free] = REASON_CODES[name]
