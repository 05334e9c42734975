"""Prepared data as it lies on disk: examples, their tokens, what of them is trained, and the rows they came from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from luthier.data.cache import map_array


@dataclass(frozen=True)
class Prepared:
    """A prepared dataset on disk; arrays are memory-mapped."""

    folder: Path
    was_cached: bool = False

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Counts, lengths, notes and hashes; the same in every output."""
        found: dict[str, Any] = orjson.loads((self.folder / "summary.json").read_bytes())
        return found

    @cached_property
    def train(self) -> npt.NDArray[np.uint64]:
        """Examples to train, in the order of the source."""
        return map_array(self.folder, "train.u64")

    @cached_property
    def valid(self) -> npt.NDArray[np.uint64]:
        """Examples held out."""
        return map_array(self.folder, "valid.u64")

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sequence."""
        offsets = self._offsets.astype(np.int64)
        return offsets[1:] - offsets[:-1]

    @cached_property
    def example_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example; of a pair, those of both its sequences together."""
        starts = self._offsets[self._first_sequences].astype(np.int64)
        return starts[1:] - starts[:-1]

    @cached_property
    def _tokens(self) -> npt.NDArray[np.uint32]:
        return map_array(self.folder, "tokens.u32")

    @cached_property
    def _offsets(self) -> npt.NDArray[np.uint64]:
        return map_array(self.folder, "offsets.u64")

    @cached_property
    def _ranges(self) -> npt.NDArray[np.uint32]:
        return map_array(self.folder, "ranges.u32").reshape(-1, 2)

    @cached_property
    def _range_offsets(self) -> npt.NDArray[np.uint64]:
        return map_array(self.folder, "range_offsets.u64")

    @cached_property
    def _first_sequences(self) -> npt.NDArray[np.uint64]:
        return map_array(self.folder, "first_sequences.u64")

    def sequences_of(self, example: int) -> range:
        """The sequences of an example: one, or chosen and rejected."""
        return range(int(self._first_sequences[example]), int(self._first_sequences[example + 1]))

    def tokens_of(self, sequence: int) -> npt.NDArray[np.uint32]:
        """Token ids of a sequence."""
        return self._tokens[int(self._offsets[sequence]) : int(self._offsets[sequence + 1])]

    def trained_of(self, sequence: int) -> npt.NDArray[np.bool_]:
        """Which tokens of a sequence are trained."""
        found = np.zeros(int(self.lengths[sequence]), bool)
        start, stop = int(self._range_offsets[sequence]), int(self._range_offsets[sequence + 1])
        for first, last in self._ranges[start:stop]:
            found[first:last] = True
        return found

    def row_of(self, example: int) -> tuple[str, int]:
        """File and line of the row an example came from."""
        row = int(map_array(self.folder, "rows.u64")[example])
        files = self.summary["files"]
        return files[int(map_array(self.folder, "row_files.u32")[row])], int(
            map_array(self.folder, "row_lines.u32")[row]
        )
