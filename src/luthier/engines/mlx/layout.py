"""A micro-batch as rectangles of rows: rows of about one length together, padded on the right.

In a causal model no token sees what comes after it, so that padding on the right changes nothing, whatever carries
state from token to token. A row that goes on from another's prompt has that prompt before it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from luthier.engines.verbs import Batch, Ints

# The shortest row beside the longest, as a share of it: what lies between is padding.
_LEAST_SHARE = 0.75


@dataclass(frozen=True)
class Rectangle:
    """Some rows of a batch: where each token comes from, and which places predict which of the batch's targets."""

    places: Ints
    """(rows, length): the token's place in the batch; padding repeats place 0."""
    rows: Ints
    columns: Ints
    targets: Ints
    """Which of the batch's targets the place at (row, column) predicts."""


def lay_out(batch: Batch, *, together: bool = True) -> Iterator[Rectangle]:
    """The rows that have something to predict, the longest first; each alone where not `together`."""
    wholes = [_places(batch, number) for number in range(len(batch.offsets) - 1)]
    counts = np.diff(batch.offsets)
    waiting = sorted((number for number in range(len(wholes)) if counts[number]), key=lambda each: -len(wholes[each]))
    while waiting:
        longest = len(wholes[waiting[0]])
        chosen = [number for number in waiting if len(wholes[number]) >= _LEAST_SHARE * longest]
        chosen = chosen if together else chosen[:1]
        waiting = waiting[len(chosen) :]
        yield _rectangle(batch, chosen, wholes)


def _places(batch: Batch, sequence: int) -> Ints:
    (start, stop), (first, last) = batch.segments[sequence].tolist(), batch.prefixes[sequence].tolist()
    return np.concatenate([np.arange(first, last), np.arange(start, stop)])


def _rectangle(batch: Batch, chosen: list[int], wholes: list[Ints]) -> Rectangle:
    places = np.zeros((len(chosen), max(len(wholes[number]) for number in chosen)), np.int64)
    rows, columns, targets = [], [], []
    for row, number in enumerate(chosen):
        whole = wholes[number]
        places[row, : len(whole)] = whole
        asked = np.arange(int(batch.offsets[number]), int(batch.offsets[number + 1]))
        start, (first, last) = int(batch.segments[number][0]), batch.prefixes[number].tolist()
        sources = batch.sources[asked]
        columns.append(np.where(sources >= start, sources - start + (last - first), sources - first))
        rows.append(np.full(len(asked), row))
        targets.append(asked)
    return Rectangle(places, np.concatenate(rows), np.concatenate(columns), np.concatenate(targets))


def rounded_up(count: int, unit: int, sizes_an_octave: int) -> int:
    """A number made round, so that there are few of them and compiled steps are used again."""
    step = max(unit, (1 << max(0, count - 1).bit_length()) // (2 * sizes_an_octave))
    return -(-count // step) * step
