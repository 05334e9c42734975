"""Two models on the same rows: their difference with a paired bootstrap interval, and who wins how often.

Rows are drawn by a fixed function of the seed, so that the same answers give the same interval everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from luthier.data.hashes import mix

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Change = Literal["better", "worse", "no detectable difference"]
Statistic = Callable[[Floats, Ints], float]
"""One number of a model's rows: of its values, and the numbers of the rows that were drawn."""

RESAMPLES = 2000
# With five rows that differ, even five wins come by chance once in sixteen; with six, once in thirty-two.
FEWEST_DIFFERING = 6
_TAILS = (2.5, 97.5)
_CONFIDENCE = 1.959963984540054  # of 95 %
_DRAWN_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Difference:
    """Tuned against base in one metric; the interval holds the difference with 95 % confidence."""

    base: float
    tuned: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    is_higher_better: bool = True

    @property
    def difference(self) -> float:
        """How much more the tuned model has."""
        return self.tuned - self.base

    @property
    def is_detected(self) -> bool:
        """Whether the interval leaves zero out, and enough rows differ at all."""
        return (self.low > 0 or self.high < 0) and self.wins + self.losses >= FEWEST_DIFFERING

    @property
    def change(self) -> Change:
        """What it means, in words."""
        if not self.is_detected:
            return "no detectable difference"
        return "better" if (self.low > 0) == self.is_higher_better else "worse"

    def as_dict(self) -> dict[str, Any]:
        """For `comparison.json`; what is not a number is left empty there."""
        numbers = {
            "base": self.base,
            "tuned": self.tuned,
            "difference": self.difference,
            "low": self.low,
            "high": self.high,
        }
        return {
            **{name: float(value) if np.isfinite(value) else None for name, value in numbers.items()},
            "wins": self.wins,
            "ties": self.ties,
            "losses": self.losses,
            "better": "higher" if self.is_higher_better else "lower",
            "verdict": self.change,
        }


@dataclass(frozen=True)
class Measure:
    """One metric of both models, a value for each row, larger or smaller the better."""

    name: str
    base: Floats
    tuned: Floats
    difference: Difference


def draw_rows(count: int, draws: range, seed: int) -> Ints:
    """For each draw, as many rows as there are, some of them several times; a line of numbers for each."""
    places = np.arange(draws.start * count, draws.stop * count, dtype=np.uint64)
    drawn = mix(places, seed) % np.uint64(count)
    return np.asarray(drawn.astype(np.int64).reshape(len(draws), count))


def compare_means(
    base: npt.ArrayLike,
    tuned: npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    is_higher_better: bool = True,
    is_exponential: bool = False,
    seed: int = 0,
) -> Difference:
    """The difference of two weighted means over the same rows, or of their exponentials, as perplexities are."""
    first, second = np.asarray(base, float), np.asarray(tuned, float)
    weight = np.ones(len(first)) if weights is None else np.asarray(weights, float)

    def mean(values: Floats, drawn: Ints) -> Floats:
        found = (values * weight)[drawn].sum(-1) / weight[drawn].sum(-1)
        return np.asarray(np.exp(np.minimum(found, 700.0)) if is_exponential else found)

    found = _difference(first, second, mean, is_higher_better=is_higher_better, seed=seed)
    is_share = weights is None and not is_exponential and bool(np.isin(second - first, (-1, 0, 1)).all())
    return _widened(found, first, second) if is_share else found


def _widened(found: Difference, base: Floats, tuned: Floats) -> Difference:
    """At least Agresti and Min's interval: rows that all go one way leave a bootstrap nothing to doubt."""
    low, high = share_interval(int((tuned > base).sum()), int((tuned < base).sum()), len(base))
    return replace(found, low=min(found.low, low), high=max(found.high, high))


def share_interval(more: int, less: int, count: int) -> tuple[float, float]:
    """Where the difference of two paired shares lies with 95 % confidence (Agresti and Min)."""
    gained, lost, rows = more + 0.5, less + 0.5, count + 2
    middle = (gained - lost) / rows
    half = _CONFIDENCE * math.sqrt(gained + lost - (gained - lost) ** 2 / rows) / rows
    return max(-1.0, middle - half), min(1.0, middle + half)


def compare_statistic(
    base: npt.ArrayLike,
    tuned: npt.ArrayLike,
    statistic: Statistic,
    *,
    is_higher_better: bool = True,
    seed: int = 0,
) -> Difference:
    """The difference of any statistic of the rows; wins and losses are of the rows' own values."""

    def each(values: Floats, drawn: Ints) -> Floats:
        return np.array([statistic(values, rows) for rows in np.atleast_2d(drawn)])

    return _difference(
        np.asarray(base, float), np.asarray(tuned, float), each, is_higher_better=is_higher_better, seed=seed
    )


def count_wins(base: Floats, tuned: Floats, *, is_higher_better: bool = True) -> tuple[int, int, int]:
    """Rows in which the tuned model is better, equal and worse."""
    gain = (tuned - base) * (1 if is_higher_better else -1)
    return int((gain > 0).sum()), int((gain == 0).sum()), int((gain < 0).sum())


def _difference(
    base: Floats,
    tuned: Floats,
    statistic: Callable[[Floats, Ints], Floats],
    *,
    is_higher_better: bool,
    seed: int,
) -> Difference:
    count = len(base)
    if count != len(tuned) or not count:
        raise ValueError(f"two models on the same rows, at least one: found {count} and {len(tuned)}")
    every = np.arange(count)[None]
    at_once = max(1, _DRAWN_AT_ONCE // count)
    gains = []
    for start in range(0, RESAMPLES, at_once):
        drawn = draw_rows(count, range(start, min(start + at_once, RESAMPLES)), seed)
        gains.append(statistic(tuned, drawn) - statistic(base, drawn))
    low, high = np.percentile(np.concatenate(gains), _TAILS)
    return Difference(
        float(statistic(base, every)[0]),
        float(statistic(tuned, every)[0]),
        float(low),
        float(high),
        *count_wins(base, tuned, is_higher_better=is_higher_better),
        is_higher_better=is_higher_better,
    )


def spearman(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Correlation of ranks, equal values sharing theirs; 0 where either side has one value only."""
    ranks = [_ranks(np.asarray(values, float)) for values in (first, second)]
    one, other = (each - each.mean() for each in ranks)
    size = float(np.sqrt((one @ one) * (other @ other)))
    return float(one @ other) / size if size else 0.0


def _ranks(values: Floats) -> Floats:
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    return np.asarray((ends - (sizes - 1) / 2)[group])
