"""What became of a run's rows: the sums of its ledger, and examples of what was dropped."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from luthier.runs.events import redact
from luthier.runs.layout import LEDGER, REJECTED

PLACES = ("train", "valid", "dropped")
_SHOWN_OF_REASON = 2
_SHOWN = 12
_PLACES_OF_REASON = 5
_ROW_BYTES = 4000


@dataclass(frozen=True)
class Dropped:
    """One dropped row as an example: where it stands, what is wrong with it, and its text where that was kept."""

    where: str
    reason: str
    message: str
    row: str


@dataclass(frozen=True)
class Rows:
    """Sums over the ledger; by place where a mapping has `train`, `valid` and `dropped`."""

    files: tuple[str, ...] = ()
    places: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PLACES, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PLACES, 0))
    trained_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PLACES, 0))
    reasons: dict[str, int] = field(default_factory=dict)
    where: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The first rows dropped for each reason, as file:line."""
    notes: dict[str, int] = field(default_factory=dict)
    lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Tokens of each row that was used, trained or held out."""
    too_long: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Tokens of each row that was dropped for its length."""
    examples: tuple[Dropped, ...] = ()
    unreadable: int = 0

    @property
    def count(self) -> int:
        """All rows."""
        return sum(self.places.values())

    @property
    def used_tokens(self) -> int:
        """Tokens of the rows that were used."""
        return self.tokens["train"] + self.tokens["valid"]

    @property
    def trained_share(self) -> float:
        """The share of the training rows' tokens that is trained."""
        return self.trained_tokens["train"] / self.tokens["train"] if self.tokens["train"] else 0.0


@dataclass
class _Sums:
    """The ledger as it is read."""

    files: dict[str, None] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PLACES, 0))
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PLACES, 0))
    trained: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PLACES, 0))
    reasons: dict[str, int] = field(default_factory=dict)
    where: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    too_long: array[int] = field(default_factory=lambda: array("q"))

    def add(self, entry: dict[str, Any]) -> None:
        file, place, tokens = str(entry["file"]), str(entry["place"]), int(entry.get("tokens", 0))
        self.files[file] = None
        self.places[place] += 1
        self.tokens[place] += tokens
        self.trained[place] += int(entry.get("trained_tokens", 0))
        if place == "dropped":
            reason = str(entry.get("reason", ""))
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
            places = self.where.setdefault(reason, [])
            if len(places) < _PLACES_OF_REASON:
                places.append(f"{file}:{entry['line']}")
            if reason == "too_long":
                self.too_long.append(tokens)
            return
        self.lengths.append(tokens)
        for note in entry.get("notes", ()):
            self.notes[str(note)] = self.notes.get(str(note), 0) + 1


def read_rows(folder: Path) -> Rows:
    """The sums of a run folder's ledger; a line that cannot be read is counted, never passed over in silence."""
    sums, unreadable = _Sums(), 0
    for entry in _read_lines(folder / LEDGER):
        try:
            sums.add(entry or {})
        except (KeyError, TypeError, ValueError):
            unreadable += 1
    return Rows(
        files=tuple(sums.files),
        places=sums.places,
        tokens=sums.tokens,
        trained_tokens=sums.trained,
        reasons=dict(sorted(sums.reasons.items(), key=lambda item: -item[1])),
        where={reason: tuple(places) for reason, places in sums.where.items()},
        notes=sums.notes,
        lengths=np.array(sums.lengths, np.int64),
        too_long=np.array(sums.too_long, np.int64),
        examples=tuple(_list_examples(folder / REJECTED)),
        unreadable=unreadable,
    )


def _read_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a JSONL file, None for a line that is none; nothing for a file that is not there."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        for line in file:
            try:
                entry = orjson.loads(line)
            except ValueError:
                entry = None
            yield entry if isinstance(entry, dict) else None


def _list_examples(path: Path) -> Iterator[Dropped]:
    shown: dict[str, int] = {}
    for entry in _read_lines(path):
        if entry is None or sum(shown.values()) >= _SHOWN:
            continue
        reason = str(entry.get("reason", ""))
        if shown.get(reason, 0) >= _SHOWN_OF_REASON:
            continue
        shown[reason] = shown.get(reason, 0) + 1
        row = entry.get("row", entry.get("row_base64", ""))
        # A row may hold its writer's keys, and a report is made to be shown around.
        text = redact((row if isinstance(row, str) else orjson.dumps(row).decode())[:_ROW_BYTES])
        message = redact(str(entry.get("message", "")))
        yield Dropped(f"{entry.get('file')}:{entry.get('line')}", reason, message, text)
