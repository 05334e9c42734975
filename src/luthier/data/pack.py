"""Lay examples out without padding: best-fit-decreasing, within one step or into bins of a fixed size.

Packing never changes what a step trains. `lay_out_step` groups one step's examples into micro-batches under a token
budget; `pack_bins` fills rows of a fixed size, for plain text and for devices that want fixed shapes.
"""

from __future__ import annotations

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
    rooms: list[list[int]] = [[] for _ in range(capacity + 1)]
    bitmap, opened = 0, 0
    chosen: list[int] = []
    for length, waiting in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while waiting:
            fitting = bitmap >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                bins = rooms[room]
            else:
                room, bins = capacity, list(range(opened, opened + max(1, -(-waiting // (capacity // length)))))
                opened += len(bins)
            each = room // length
            used = bins[-(-(-waiting // each)) :] if waiting < each * len(bins) else bins[:]
            del bins[len(bins) - len(used) :]
            if bins:
                bitmap |= 1 << room
                rooms[room] = bins
            else:
                bitmap &= ~(1 << room)
            placed = _spread(used, each, waiting)
            chosen += placed
            full, partly = divmod(len(placed), each)
            bitmap = _put_back(rooms, bitmap, room - each * length, used[:full])
            if partly:
                bitmap = _put_back(rooms, bitmap, room - partly * length, used[full : full + 1])
            waiting -= len(placed)
    bin_of = np.empty(len(sizes), np.int64)
    bin_of[by_length] = chosen
    return bin_of


def _spread(bins: list[int], each: int, waiting: int) -> list[int]:
    if each == 1:
        return bins[:waiting]
    return [number for number in bins for _ in range(each)][:waiting]


def _put_back(rooms: list[list[int]], bitmap: int, room: int, bins: list[int]) -> int:
    if not bins or room == 0:
        return bitmap
    rooms[room] += bins
    return bitmap | 1 << room


def fill(lengths: npt.ArrayLike, bins: Indices, capacity: int) -> float:
    """Share of the bins' room that holds tokens."""
    used = int(np.asarray(lengths, np.int64).sum())
    return used / (capacity * (int(bins.max(initial=-1)) + 1)) if len(bins) else 1.0
