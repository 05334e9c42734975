"""Lay examples out without padding: best-fit-decreasing, within one step or into bins of a fixed size.

Packing never changes what a step trains. `lay_out_step` groups one step's examples into micro-batches under a token
budget; `pack_bins` fills rows of a fixed size, for plain text and for devices that want fixed shapes.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def lay_out_step(lengths: npt.ArrayLike, budget_tokens: int) -> list[list[int]]:
    """Micro-batches of a step as lists of its positions; an item longer than the budget is alone.

    A preference pair is one item whose length is both its sequences together, so it is never parted.
    """
    sizes = np.asarray(lengths, np.int64)
    is_long = sizes > budget_tokens
    bins = np.empty(len(sizes), np.int64)
    bins[~is_long] = pack_bins(sizes[~is_long], budget_tokens)
    bins[is_long] = bins[~is_long].max(initial=-1) + 1 + np.arange(is_long.sum())
    groups: dict[int, list[int]] = {}
    for position, number in enumerate(bins.tolist()):
        groups.setdefault(number, []).append(position)
    return sorted(groups.values())


def pack_bins(lengths: npt.ArrayLike, capacity: int) -> Indices:
    """The bin of each item, by best-fit-decreasing; raises ValueError for an item larger than a bin.

    Bins are kept by the room left in them, and a bitmap says which rooms exist, so the tightest bin that fits is
    found by one shift. Items of one length go together: a million items pack in well under a second.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and (sizes.max() > capacity or sizes.min() < 1):
        raise ValueError(f"lengths must lie between 1 and {capacity}, found {sizes.min()} to {sizes.max()}")
    by_length = np.argsort(-sizes, kind="stable")
    values, counts = np.unique(sizes, return_counts=True)
    rooms = _Rooms(capacity)
    chosen: list[int] = []
    for length, waiting in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while waiting:
            room = rooms.tightest(length)
            each = room // length
            bins = rooms.take(room, math.ceil(waiting / each))
            placed = [number for number in bins for _ in range(each)][:waiting]
            full, partly = divmod(len(placed), each)
            rooms.put(room - each * length, bins[:full])
            rooms.put(room - partly * length, bins[full:])
            chosen += placed
            waiting -= len(placed)
    bin_of = np.empty(len(sizes), np.int64)
    bin_of[by_length] = chosen
    return bin_of


class _Rooms:
    """Bins by the room left in them, and a bitmap of the rooms that have any."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._bins: list[list[int]] = [[] for _ in range(capacity + 1)]
        self._bitmap = 0
        self._opened = 0

    def tightest(self, length: int) -> int:
        """The smallest room that fits; that of an empty bin where no open one does."""
        fitting = self._bitmap >> length
        return length + (fitting & -fitting).bit_length() - 1 if fitting else self._capacity

    def take(self, room: int, count: int) -> list[int]:
        """Up to `count` bins of that room; where there are none, as many new ones."""
        bins = self._bins[room]
        if not bins:
            self._opened += count
            return list(range(self._opened - count, self._opened))
        taken = bins[-count:]
        del bins[-count:]
        if not bins:
            self._bitmap &= ~(1 << room)
        return taken

    def put(self, room: int, bins: list[int]) -> None:
        """Put bins back; a full one is never asked for again."""
        if bins and room:
            self._bins[room] += bins
            self._bitmap |= 1 << room


def fill(lengths: npt.ArrayLike, bins: Indices, capacity: int) -> float:
    """Share of the bins' room that holds tokens."""
    used = int(np.asarray(lengths, np.int64).sum())
    return used / (capacity * (int(bins.max(initial=-1)) + 1)) if len(bins) else 1.0
