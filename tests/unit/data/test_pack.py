"""Packing loses nothing, exceeds nothing, and is as tight as the plain algorithm it speeds up."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.pack import fill, lay_out_step, pack_bins

CAPACITY = 64
lengths = st.lists(st.integers(1, CAPACITY), max_size=60)


def naive_bins(sizes: list[int], capacity: int) -> list[int]:
    """Best-fit-decreasing as the textbook has it: what each bin holds."""
    held: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [number for number, used in enumerate(held) if used + size <= capacity]
        if fitting:
            held[max(fitting, key=lambda number: held[number])] += size
        else:
            held.append(size)
    return held


@given(lengths)
def test_no_bin_is_over_its_size_and_each_item_is_in_one(sizes: list[int]) -> None:
    bins = pack_bins(sizes, CAPACITY)
    assert len(bins) == len(sizes)
    used = np.bincount(bins, weights=sizes) if sizes else np.zeros(0)
    assert (used <= CAPACITY).all()
    assert (used > 0).all(), "bins are numbered without gaps"


@given(lengths)
def test_as_tight_as_the_textbook(sizes: list[int]) -> None:
    bins = pack_bins(sizes, CAPACITY)
    used = np.bincount(bins, weights=sizes).astype(int).tolist() if sizes else []
    assert sorted(used) == sorted(naive_bins(sizes, CAPACITY))


@pytest.mark.parametrize("sizes", [[0], [-1], [CAPACITY + 1], [1, 2, CAPACITY + 1]])
def test_an_item_that_fits_in_no_bin_is_an_error(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths must lie between 1 and 64"):
        pack_bins(sizes, CAPACITY)


def test_a_hundred_thousand_rows_are_packed_tightly_and_soon() -> None:
    sizes = np.random.default_rng(0).lognormal(5.5, 0.9, 100_000).astype(np.int64).clip(1, 4096)
    start = time.process_time()
    bins = pack_bins(sizes, 4096)
    assert time.process_time() - start < 2
    assert fill(sizes, bins, 4096) >= 0.999
    assert np.bincount(bins, weights=sizes).max() <= 4096


@given(st.lists(st.integers(1, 2 * CAPACITY), max_size=40))
def test_a_step_keeps_its_positions_within_the_budget(sizes: list[int]) -> None:
    groups = lay_out_step(sizes, CAPACITY)
    assert sorted(position for group in groups for position in group) == list(range(len(sizes)))
    for group in groups:
        assert group == sorted(group)
        assert sum(sizes[position] for position in group) <= CAPACITY or len(group) == 1


@given(lengths)
def test_a_step_is_laid_out_by_its_lengths_alone(sizes: list[int]) -> None:
    assert lay_out_step(sizes, CAPACITY) == lay_out_step(np.array(sizes, np.int32), CAPACITY)


def test_nothing_to_pack() -> None:
    assert lay_out_step([], CAPACITY) == []
    assert pack_bins([], CAPACITY).tolist() == []
    assert fill([], pack_bins([], CAPACITY), CAPACITY) == 1.0


def test_fill_is_the_share_of_used_room() -> None:
    assert fill([32, 32, 32], np.array([0, 0, 1]), 64) == 0.75
