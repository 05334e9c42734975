"""Axes and points of a figure: round ticks, linear or logarithmic, and curves thinned without losing their shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from luthier.reports.words import show_number

MAX_POINTS = 2000
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_LOG_RATIO = 30.0
_MOST_TICKS = 7
_LABEL_LETTERS = 6
_LARGE = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))

Points = npt.NDArray[np.float64]
"""Rows of (x, y)."""


@dataclass(frozen=True)
class Axis:
    """A range of values, where its ticks stand, and what they say."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1 at the high one; what lies outside stands at the edge."""
        if self.is_log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))

    @property
    def labels(self) -> list[str]:
        """The ticks in words, all written alike."""
        size, letter = next(((size, letter) for least, size, letter in _LARGE if least <= self.high), (1.0, ""))
        shown = [f"{show_number(tick / size)}{letter if tick else ''}" for tick in self.ticks]
        if all(len(text) <= _LABEL_LETTERS and "e" not in text for text in shown):
            return shown
        return [_exponent(tick) if tick else "0" for tick in self.ticks]


def _exponent(value: float) -> str:
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def linear_axis(low: float, high: float, count: int = 5, *, from_zero: bool = False, whole: bool = False) -> Axis:
    """An axis over the values whose ends and ticks are round numbers."""
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low < 1e-12 * max(1.0, abs(high)):
        margin = abs(high) * 0.1 or 1.0
        low, high = (0.0 if from_zero else low - margin), high + margin
    step = _round_step((high - low) / count, whole=whole)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = 12 - math.floor(math.log10(step))
    ticks = tuple(round(number * step, digits) for number in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def step_axis(first: int, last: int, count: int = 6) -> Axis:
    """An axis of optimizer steps: it ends where they end, and its ticks are whole and round."""
    last = max(last, first + 1)
    step = _round_step((last - first) / count, whole=True)
    ticks = [number * step for number in range(math.ceil(first / step), math.floor(last / step) + 1)]
    inner = [tick for tick in ticks if first < tick < last]
    # The ends are named, too, unless a round tick stands so close that the two would touch.
    near = (last - first) * 0.09
    kept = [tick for tick in inner if tick - first > near and last - tick > near]
    return Axis(float(first), float(last), (float(first), *kept, float(last)))


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis that ends at 1, 2 or 5 of a power of ten, with ticks there or, of many, at the powers."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    round_values = [first * 10.0**power for power in powers for first in (1, 2, 5)]
    start = max(value for value in round_values if value <= low * 1.0001)
    end = min(value for value in round_values if value >= high * 0.9999 and value > start)
    ticks = tuple(value for value in round_values if start <= value <= end)
    if len(ticks) > _MOST_TICKS:
        ticks = tuple(10.0**power for power in powers if start <= 10.0**power <= end)
        ticks = ticks[:: math.ceil(len(ticks) / (_MOST_TICKS - 2))]
        apart = 0.4 * math.log(end / start) / len(ticks)
        ends = [value for value in (start, end) if min(abs(math.log(value / tick)) for tick in ticks) > apart]
        ticks = tuple(sorted({*ticks, *ends}))
    return Axis(start, end, ticks, is_log=True)


def value_axis(values: Sequence[float] | npt.NDArray[np.float64], *, from_zero: bool = False) -> Axis:
    """Logarithmic where all values are positive and span more than thirty-fold, else linear."""
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        return linear_axis(0.0, 1.0)
    low, high = float(finite.min()), float(finite.max())
    if low > 0 and high / low > _LOG_RATIO and not from_zero:
        return log_axis(low, high)
    return linear_axis(low, high, from_zero=from_zero or (low >= 0 and low < 0.5 * high))


def _round_step(wanted: float, *, whole: bool) -> float:
    size = 10.0 ** math.floor(math.log10(wanted))
    step = next(size * each for each in _STEPS if size * each >= wanted * 0.999)
    return max(1.0, math.ceil(step)) if whole else step


def thin(points: Points, most: int = MAX_POINTS) -> Points:
    """At most so many of the points, chosen by the largest triangle (LTTB), so that peaks stay where they are."""
    if len(points) <= most:
        return points
    edges = np.linspace(1, len(points) - 1, most - 1).astype(int)
    means = [points[start:end].mean(axis=0) for start, end in pairwise(edges)] + [points[-1]]
    kept = [0]
    for number, (start, end) in enumerate(pairwise(edges)):
        last, ahead, bucket = points[kept[-1]], means[number + 1], points[start:end]
        areas = np.abs(
            (last[0] - ahead[0]) * (bucket[:, 1] - last[1]) - (last[0] - bucket[:, 0]) * (ahead[1] - last[1])
        )
        kept.append(start + int(areas.argmax()))
    return points[[*kept, len(points) - 1]]


def smooth(points: Points) -> Points:
    """A running mean over a twentieth of the points, so that the course shows through the noise."""
    reach = max(1, len(points) // 40)
    values = points[:, 1]
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    # The window shrinks towards both ends, where a curve is read; not to nothing, or it would end in the noise.
    half = np.maximum(max(1, reach // 4), np.minimum(reach, np.minimum(places, len(values) - 1 - places)))
    first, last = np.maximum(0, places - half), np.minimum(len(values), places + half + 1)
    means = (sums[last] - sums[first]) / (last - first)
    return np.column_stack([points[:, 0], means])


@dataclass(frozen=True)
class Bins:
    """A histogram: edges, one more than there are counts."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    is_log: bool = False


def bin_lengths(lengths: npt.NDArray[np.int64], count: int = 28) -> Bins:
    """Lengths in bins with round edges; in doubling ones where a few are far longer than the rest."""
    if not len(lengths):
        return Bins((0.0, 1.0), (0,))
    low, high, middle = int(lengths.min()), int(lengths.max()), float(np.median(lengths))
    if high > 12 * max(1.0, middle) or high > 200 * max(1, low):
        first = math.floor(math.log2(max(1, low)))
        halves = math.ceil((math.log2(max(2, high)) - first) * 2 + 1e-9)
        edges = np.unique(np.round(2.0 ** (first + np.arange(halves + 1) / 2))).astype(float)
        edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high + 1)
        is_log = True
    else:
        step = _round_step(max(1.0, (high + 1 - low) / count), whole=True)
        edges = np.arange(math.floor(low / step), math.floor(high / step) + 2).astype(float) * step
        is_log = False
    counts, _ = np.histogram(lengths, edges)
    return Bins(tuple(map(float, edges)), tuple(map(int, counts)), is_log)
