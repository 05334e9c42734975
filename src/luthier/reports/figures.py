"""The figures of a report: which curves are drawn, on which axes, for one run or for several side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from luthier.reports.drawing import COLOURS, Chart, Mark, Series
from luthier.reports.model import Report
from luthier.reports.scale import Axis, Points, bin_lengths, linear_axis, smooth, step_axis, value_axis
from luthier.reports.words import show_number

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SMOOTH_FROM = 40
_WIDE = 300
_NARROW = 220
_NARROW_TICKS = 3
_CURVES = (
    ("learning_rate", "Learning rate"),
    ("grad_norm", "Gradient norm"),
    ("tokens_per_second", "Tokens per second"),
)

# What pairs are learnt by, in the loop's own names; the two answers of a pair share a figure.
_REWARDS = (("reward_margin", "Reward margin"), ("reward_accuracy", "Better answer preferred"))
_OF_ANSWERS = (("reward_chosen", "chosen"), ("reward_rejected", "rejected"))


def letter(number: int) -> str:
    """The short name of a run among several."""
    return LETTERS[number] if number < len(LETTERS) else f"#{number + 1}"


def colour(number: int) -> int:
    """Its colour."""
    return number % COLOURS + 1


def list_charts(reports: Sequence[Report]) -> list[Chart]:
    """Every figure for which there is something to draw; the losses first."""
    drawn = [report for report in reports if len(report.steps)]
    found: list[Chart | None] = []
    if drawn:
        found += [draw_loss(reports[0])] if len(reports) == 1 else [train_losses(reports), held_out_losses(reports)]
        found += [draw_rewards(reports[0])] if len(reports) == 1 else []
        found += [_reward(reports, name, title) for name, title in _REWARDS]
        found += [_curve(reports, name, title) for name, title in _CURVES]
    found.append(lengths(reports))
    return [chart for chart in found if chart is not None]


def draw_loss(report: Report) -> Chart:
    """Training loss, and held-out loss over it."""
    train, held = report.steps.points("loss"), report.held_out("loss")
    series = _smoothed("training loss", train, 1)
    lowest = None
    if len(held):
        series.append(Series("held-out loss", held, 2, "dots"))
        place = int(held[:, 1].argmin())
        lowest = (float(held[place, 0]), float(held[place, 1])) if len(held) > 1 else None
    axis = value_axis(np.concatenate([train[:, 1], held[:, 1]]))
    about = _course(train)
    if lowest:
        about += f" Held-out loss was lowest at step {lowest[0]:,.0f}: {show_number(lowest[1])}."
    return Chart(
        "loss",
        _scaled("Loss", axis),
        about,
        "step",
        _steps([report]),
        axis,
        tuple(series),
        marks=tuple(_marks(report)),
        lowest=lowest,
        height=_WIDE,
    )


def _course(points: Points) -> str:
    """From where to where a curve goes, in words."""
    if not len(points):
        return "No step had a finite loss."
    (first, start), (last, end) = points[0], points[-1]
    return f"From {show_number(start)} at step {first:,.0f} to {show_number(end)} at step {last:,.0f}."


def _smoothed(name: str, points: Points, number: int) -> list[Series]:
    """A curve with its noise behind it, or as it is where there are few points."""
    if len(points) < _SMOOTH_FROM:
        return [Series(name, points, number)]
    return [Series("", points, number, "faint"), Series(name, smooth(points), number)]


def _steps(reports: Sequence[Report], count: int = 6) -> Axis:
    return step_axis(0, max(int(report.steps.number[-1]) for report in reports if len(report.steps)), count)


def _scaled(title: str, axis: Axis) -> str:
    return f"{title} (logarithmic)" if axis.is_log else title


def _marks(report: Report) -> list[Mark]:
    kinds = ("step_skipped", "step_replayed", "resumed")
    return [
        Mark(float(each.step), each.text, each.kind == "step_skipped")
        for each in report.incidents
        if each.kind in kinds and each.step
    ]


def train_losses(reports: Sequence[Report]) -> Chart | None:
    """The training losses of several runs, smoothed."""
    curves = [report.steps.points("loss") for report in reports]
    smoothed = [smooth(points) if len(points) >= _SMOOTH_FROM else points for points in curves]
    return _several(reports, "loss", "Training loss, smoothed", smoothed, "line")


def held_out_losses(reports: Sequence[Report]) -> Chart | None:
    """The held-out losses of several runs."""
    return _several(reports, "held_out_loss", "Held-out loss", [report.held_out("loss") for report in reports], "dots")


def _several(
    reports: Sequence[Report], name: str, title: str, curves: list[Points], style: str, *, is_of_pairs: bool = False
) -> Chart | None:
    values = np.concatenate([points[:, 1] for points in curves])
    if not len(values):
        return None
    axis = value_axis(values, from_zero=is_of_pairs)
    height, ticks = (_NARROW, _NARROW_TICKS) if is_of_pairs else (_WIDE, 6)
    series = tuple(
        Series(letter(number), points, colour(number), "dots" if style == "dots" else "line")
        for number, points in enumerate(curves)
    )
    ends = [f"{letter(n)} ends at {show_number(points[-1, 1])}" for n, points in enumerate(curves) if len(points)]
    about = f"{'; '.join(ends)}."
    return Chart(name, _scaled(title, axis), about, "step", _steps(reports, ticks), axis, series, height=height)


def _curve(reports: Sequence[Report], name: str, title: str) -> Chart | None:
    """One value of each step: with its noise for a single run, smoothed for several."""
    curves = [report.steps.points(name) for report in reports]
    values = np.concatenate([points[:, 1] for points in curves])
    if not len(values):
        return None
    axis = value_axis(values, from_zero=name != "grad_norm")
    if len(reports) > 1:
        series = [
            Series(
                letter(n),
                points if name == "learning_rate" or len(points) < _SMOOTH_FROM else smooth(points),
                colour(n),
            )
            for n, points in enumerate(curves)
        ]
    elif name == "learning_rate":
        series = [Series(title, curves[0])]
    else:
        series = _smoothed(title, curves[0], 1)
    about = f"Median {show_number(float(np.median(values)))}, highest {show_number(float(values.max()))}."
    return Chart(name, _scaled(title, axis), about, "step", _steps(reports, _NARROW_TICKS), axis, tuple(series))


def draw_rewards(report: Report) -> Chart | None:
    """What each answer of a pair is rewarded with: how far its likelihood has moved from where it began."""
    series, told, values = [], [], []
    for number, (name, said) in enumerate(_OF_ANSWERS, 1):
        points, held = report.steps.points(name), report.held_out(name)
        if len(points):
            series += _smoothed(said, points, number)
            told.append(f"{said} ends at {show_number(points[-1, 1])}")
        if len(held):
            series.append(Series(f"{said}, held out", held, number, "dots"))
        values += [points[:, 1], held[:, 1]]
    if not series:
        return None
    axis = value_axis(np.concatenate(values), from_zero=True)
    about = f"{'; '.join(told)}." if told else ""
    title = "Rewards of the chosen and the rejected answers"
    return Chart(
        "rewards", title, about[:1].upper() + about[1:], "step", _steps([report]), axis, tuple(series), height=_WIDE
    )


def _reward(reports: Sequence[Report], name: str, title: str) -> Chart | None:
    """One measure of pairs: training and held-out pairs for a single run, training alone for several."""
    curves = [report.steps.points(name) for report in reports]
    if len(reports) > 1:
        smoothed = [smooth(points) if len(points) >= _SMOOTH_FROM else points for points in curves]
        return _several(reports, name, f"{title}, smoothed", smoothed, "line", is_of_pairs=True)
    held = reports[0].held_out(name)
    if not len(curves[0]) and not len(held):
        return None
    series = _smoothed("training", curves[0], 1) if len(curves[0]) else []
    if len(held):
        series.append(Series("held out", held, 2, "dots"))
    axis = value_axis(np.concatenate([curves[0][:, 1], held[:, 1]]), from_zero=True)
    last = held if len(held) else curves[0]
    about = f"{'Held out' if len(held) else 'Training'} ends at {show_number(last[-1, 1])}."
    return Chart(name, title, about, "step", _steps(reports, _NARROW_TICKS), axis, tuple(series))


def lengths(reports: Sequence[Report]) -> Chart | None:
    """How long the rows are: bars for one run, outlines for several that differ in their data."""
    found = [report.rows.lengths for report in reports]
    if len({report.data_hash for report in reports}) == 1:
        found = found[:1]
    whole = np.concatenate(found)
    if not len(whole):
        return None
    bins = bin_lengths(whole)
    x = value_axis(bins.edges) if not bins.is_log else _log_lengths(bins.edges)
    if not bins.is_log:
        x = Axis(bins.edges[0], bins.edges[-1], tuple(t for t in x.ticks if bins.edges[0] <= t <= bins.edges[-1]))
    middle = np.quantile(whole, 0.5, method="higher")
    about = f"{len(whole):,} rows; median {middle:,} tokens, longest {whole.max():,}."
    title = "Length of the rows in tokens"
    if len(found) == 1:
        y = linear_axis(0, max(bins.counts), 4, from_zero=True, whole=True)
        return Chart("lengths", title, about, "tokens", x, y, bins=bins)
    series, most = [], 1
    for number, each in enumerate(found):
        counts = np.histogram(each, bins.edges)[0]
        most = max(most, int(counts.max()))
        outline = np.column_stack([np.repeat(bins.edges, 2), [0, *np.repeat(counts, 2), 0]]).astype(float)
        series.append(Series(letter(number), outline, colour(number)))
    y = linear_axis(0, most, 4, from_zero=True, whole=True)
    return Chart("lengths", title, about, "tokens", x, y, tuple(series))


def _log_lengths(edges: Sequence[float]) -> Axis:
    """Doubling lengths, with as many ticks as there is room for."""
    doublings = [2.0**power for power in range(31) if edges[0] <= 2.0**power <= edges[-1]]
    every = max(1, math.ceil(len(doublings) / 6))
    return Axis(max(1.0, edges[0]), edges[-1], tuple(doublings[::every]), is_log=True)
