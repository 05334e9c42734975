"""Axes with round ticks, curves that keep their peaks, histograms that lose no row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from luthier.reports.scale import (
    MAX_POINTS,
    bin_lengths,
    linear_axis,
    log_axis,
    smooth,
    step_axis,
    thin,
    value_axis,
)

FLOATS = st.floats(-1e9, 1e9, allow_nan=False)


@given(FLOATS, FLOATS, st.booleans())
@example(0.0, 2.9e-67, False)
@example(1e-13, 4e-12, False)
@example(0.0, 5e-324, False)
def test_a_linear_axis_holds_its_values_between_few_round_ticks(first: float, second: float, from_zero: bool) -> None:
    low, high = sorted((first, second))
    axis = linear_axis(low, high, from_zero=from_zero)
    margin = 1e-6 * max(1.0, abs(low), abs(high))
    assert axis.low <= low + margin
    assert axis.high >= high - margin
    assert 2 <= len(axis.ticks) <= 9
    assert list(axis.ticks) == sorted(set(axis.ticks))
    assert axis.place(axis.low) == 0
    assert axis.place(axis.high) == 1


@given(st.floats(1e-12, 1e12), st.floats(1.0, 1e9))
def test_a_logarithmic_axis_does_so_too(low: float, ratio: float) -> None:
    axis = log_axis(low, low * ratio)
    assert axis.low <= low * 1.001
    assert axis.high >= low * ratio * 0.999
    assert 1 <= len(axis.ticks) <= 7
    assert all(0 <= axis.place(tick) <= 1 for tick in axis.ticks)


@given(st.integers(1, 10_000_000), st.integers(2, 8))
def test_ticks_of_steps_are_whole_and_apart(last: int, count: int) -> None:
    axis = step_axis(0, last, count)
    assert all(tick == int(tick) for tick in axis.ticks)
    assert (axis.ticks[0], axis.ticks[-1]) == (0, last)
    assert all(b - a > 0.09 * last for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)) or last < 12


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 0.002, ["0", "0.0005", "0.001", "0.0015", "0.002"]),
        (0, 0.0002, ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]),
        (0, 25_000, ["0", "5k", "10k", "15k", "20k", "25k"]),
        (0, 2_000, ["0", "500", "1,000", "1,500", "2,000"]),
        (0, 3, ["0", "1", "2", "3"]),
    ],
)
def test_labels_of_one_axis_are_written_alike(low: float, high: float, labels: list[str]) -> None:
    assert linear_axis(low, high).labels == labels


def test_values_that_span_much_get_a_logarithmic_axis() -> None:
    assert value_axis([4.6, 0.002]).is_log
    assert not value_axis([4.6, 2.0]).is_log
    assert not value_axis([4.6, 0.0]).is_log
    assert not value_axis([4.6, 0.002], from_zero=True).is_log
    assert value_axis([float("nan")]).ticks


@given(st.integers(3, 9000), st.integers(3, 400))
def test_thinning_keeps_the_ends_and_the_order(count: int, most: int) -> None:
    points = np.column_stack([np.arange(count), np.sin(np.arange(count))])
    thinned = thin(points, most)
    assert len(thinned) == min(count, most)
    assert (thinned[0] == points[0]).all()
    assert (thinned[-1] == points[-1]).all()
    assert (np.diff(thinned[:, 0]) > 0).all()


def test_thinning_keeps_a_single_spike() -> None:
    values = np.ones(200_000)
    values[123_456] = 50
    thinned = thin(np.column_stack([np.arange(len(values)), values]))
    assert len(thinned) == MAX_POINTS
    assert [123_456, 50] in thinned.tolist()


def test_smoothing_keeps_what_is_straight_and_calms_what_is_not() -> None:
    steps = np.arange(500.0)
    flat = np.column_stack([steps, np.full(500, 3.0)])
    assert np.allclose(smooth(flat), flat)
    noisy = np.column_stack([steps, np.random.default_rng(0).normal(size=500)])
    assert smooth(noisy)[:, 1].std() < 0.4 * noisy[:, 1].std()


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=300))
def test_each_row_is_in_one_bin(lengths: list[int]) -> None:
    bins = bin_lengths(np.array(lengths))
    assert sum(bins.counts) == len(lengths)
    assert len(bins.edges) == len(bins.counts) + 1
    assert list(bins.edges) == sorted(set(bins.edges))
    assert len(bins.counts) <= 60


def test_no_rows_are_one_empty_bin() -> None:
    assert bin_lengths(np.zeros(0, np.int64)).counts == (0,)
