"""Intervals and verdicts: deterministic, symmetrical, honest about few rows, and right about known samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.evals.statistics import (
    compare_means,
    compare_statistic,
    count_wins,
    draw_rows,
    share_interval,
    spearman,
)

FLOATS = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 3))
PAIRED = st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=30)
FLAGS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


def split(rows: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [row[0] for row in rows], [row[1] for row in rows]


@given(PAIRED, st.integers(0, 2**32))
def test_the_interval_is_the_same_for_the_same_seed_and_turns_round_with_the_models(
    rows: list[tuple[float, float]], seed: int
) -> None:
    base, tuned = split(rows)
    found = compare_means(base, tuned, seed=seed)
    assert found == compare_means(base, tuned, seed=seed)
    turned = compare_means(tuned, base, seed=seed)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=1e-9)
    assert (turned.wins, turned.ties, turned.losses) == (found.losses, found.ties, found.wins)
    assert found.wins + found.ties + found.losses == len(rows)
    assert found.difference == pytest.approx(np.mean(tuned) - np.mean(base), abs=1e-9)


@given(PAIRED)
def test_a_model_is_never_told_from_itself(rows: list[tuple[float, float]]) -> None:
    base, _ = split(rows)
    found = compare_means(base, base)
    assert found.change == "no detectable difference"
    assert found.low <= 0 <= found.high


@given(FLAGS)
def test_the_interval_of_shares_is_around_the_difference_and_never_empty(rows: list[tuple[bool, bool]]) -> None:
    base, tuned = split([(float(one), float(other)) for one, other in rows])
    found = compare_means(base, tuned)
    assert -1 <= found.low < found.high <= 1
    assert found.low <= found.difference <= found.high


@pytest.mark.parametrize(("rows", "change"), [(5, "no detectable difference"), (6, "better"), (60, "better")])
def test_too_few_rows_prove_nothing_however_they_go(rows: int, change: str) -> None:
    assert compare_means(np.zeros(rows), np.ones(rows)).change == change
    gains = np.arange(rows) + 10.0
    assert compare_means(np.zeros(rows), gains).change == change


def test_worse_and_lower_is_better() -> None:
    low, high = np.full(20, 1.0) + np.arange(20) / 100, np.full(20, 2.0)
    assert compare_means(high, low).change == "worse"
    found = compare_means(high, low, is_higher_better=False)
    assert found.change == "better"
    assert (found.wins, found.losses) == (20, 0)
    assert found.as_dict()["better"] == "lower"


def test_agresti_and_min_by_hand() -> None:
    # 8 gained and 2 lost of 18: (8.5 - 2.5) / 20, with a variance of (11 - 36 / 20) / 400.
    half = 1.959964 * math.sqrt((11 - 36 / 20) / 400)
    assert share_interval(8, 2, 18) == pytest.approx((0.3 - half, 0.3 + half), abs=1e-6)
    assert share_interval(0, 0, 10)[0] < 0 < share_interval(0, 0, 10)[1]


def test_the_bootstrap_agrees_with_the_normal_interval_of_a_mean() -> None:
    values = np.sin(np.arange(400) * 12.9898) * 3
    found = compare_means(np.zeros(400), values + 0.5)
    half = 1.96 * values.std() / math.sqrt(400)
    assert (found.low, found.high) == pytest.approx((found.difference - half, found.difference + half), abs=0.04)


def test_weights_make_long_rows_count_more() -> None:
    found = compare_means([1.0, 3.0], [2.0, 7.0], weights=[1, 3])
    assert (found.base, found.tuned) == (2.5, 5.75)


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    found = compare_means([0.0, 2.0], [1.0, 1.0], is_exponential=True)
    assert (found.base, found.tuned) == (pytest.approx(math.e), pytest.approx(math.e))
    assert found.difference == pytest.approx(0)


def test_rows_are_drawn_evenly_and_never_differently() -> None:
    drawn = draw_rows(10, range(2000), 0)
    assert drawn.shape == (2000, 10)
    counts = np.bincount(drawn.ravel(), minlength=10)
    assert counts.min() > 1850
    assert counts.max() < 2150
    assert draw_rows(10, range(3, 5), 7).tolist() == draw_rows(10, range(5), 7)[3:].tolist()
    assert draw_rows(5, range(1), 1).tolist() == [[0, 4, 1, 1, 4]]


def test_rows_of_two_lengths_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="at least one: found 1 and 2"):
        compare_means([1], [1, 2])
    with pytest.raises(ValueError, match="found 0 and 0"):
        compare_means([], [])


@given(st.lists(FLOATS, min_size=2, max_size=30))
def test_spearman_sees_order_only(values: list[float]) -> None:
    expected = 0.0 if len(set(values)) == 1 else 1.0
    assert spearman(values, [value**3 + 7 for value in values]) == pytest.approx(expected)
    assert spearman(values, [-value for value in values]) == pytest.approx(-expected)


def test_spearman_by_hand_with_ties() -> None:
    # Ranks 1, 2.5, 2.5, 4 and 2, 1, 3, 4, each from their mean of 2.5.
    assert spearman([1, 5, 5, 9], [20, 10, 30, 40]) == pytest.approx(3 / math.sqrt(4.5 * 5))


def test_any_statistic_can_be_compared() -> None:
    right = np.arange(30.0)
    base = np.where(right % 2, right, 30 - right)

    def order(values: np.ndarray, drawn: np.ndarray) -> float:  # type: ignore[type-arg]
        return spearman(values[drawn], right[drawn])

    found = compare_statistic(base, right, order)
    assert found.tuned == pytest.approx(1.0)
    assert found.change == "better"
    assert count_wins(base, right) == (found.wins, found.ties, found.losses)
