"""Charts as SVG text: fluid inside a page, or a file of its own that is readable in light, in dark and on paper.

Only the curves are stretched to the width they are given; text, dots and lines keep their size, on a phone, too.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from luthier.reports.scale import Axis, Bins, Points, thin
from luthier.reports.words import show_number, visible

Style = Literal["line", "faint", "dots"]
COLOURS = 8
FILE_WIDTH = 760
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 20, 12, 40
_ACROSS = 1000
_LETTER = 6.7
_LEGEND = 26

PALETTE = """
  --back: #ffffff; --ink: #1d2129; --quiet: #5d6673; --grid: #e4e7ec; --good: #1a7f37; --bad: #b42318;
  --warn: #9a6700;
  --c1: #2f62b0; --c2: #b4480f; --c3: #1d7d5a; --c4: #8a3fa8;
  --c5: #7a6200; --c6: #0f7590; --c7: #b3305f; --c8: #5c5c5c;
"""
DARK_PALETTE = """
  --back: #14171c; --ink: #e6e9ee; --quiet: #9aa4b2; --grid: #2b313a; --good: #4cc26a; --bad: #ff8278;
  --warn: #dca93a;
  --c1: #84b2f7; --c2: #f3a063; --c3: #5fd0a5; --c4: #cf9bea;
  --c5: #d8c15a; --c6: #5fc6e0; --c7: #f58ab0; --c8: #b4b4b4;
"""
FIGURE_STYLE = (
    f"""
svg.chart.inline {{
  display: block; overflow: visible; width: calc(100% - {_LEFT + _RIGHT}px);
  margin: {_TOP}px {_RIGHT}px {_BOTTOM}px {_LEFT}px;
}}
"""
    + """
svg.chart text { fill: var(--quiet); font: 11.5px system-ui, "Segoe UI", "Helvetica Neue", sans-serif; }
svg.chart .grid { stroke: var(--grid); stroke-width: 1; shape-rendering: crispEdges; }
svg.chart .axis { stroke: var(--quiet); stroke-width: 1; shape-rendering: crispEdges; }
svg.chart path { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg.chart path, svg.chart .mark { vector-effect: non-scaling-stroke; }
svg.chart .faint { stroke-width: 1; opacity: .38; }
svg.chart circle { fill: currentColor; stroke: var(--back); stroke-width: 1.5; }
svg.chart .lowest { fill: var(--back); stroke: currentColor; stroke-width: 2.5; }
svg.chart .bin { fill: currentColor; opacity: .82; }
svg.chart .mark { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 3 3; }
svg.chart .mark.bad { stroke: var(--bad); }
"""
    + "".join(f".c{n} {{ color: var(--c{n}); }}\n" for n in range(1, COLOURS + 1))
)
_FILE_STYLE = f""":root {{ color-scheme: light dark; {PALETTE} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK_PALETTE} }} }}
@media print {{ :root {{ {PALETTE} }} }}
{FIGURE_STYLE}
svg.chart .paper {{ fill: var(--back); }}
svg.chart .title {{ fill: var(--ink); font-weight: 600; font-size: 13px; }}
"""


@dataclass(frozen=True)
class Series:
    """One curve: `faint` is what stands behind a smoothed one, `dots` has few points and shows each."""

    name: str
    points: Points
    colour: int = 1
    style: Style = "line"


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    step: float
    text: str
    is_bad: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure with everything decided but its width."""

    name: str
    title: str
    about: str
    x_label: str
    x_axis: Axis
    y_axis: Axis
    series: tuple[Series, ...] = ()
    bins: Bins | None = None
    marks: tuple[Mark, ...] = ()
    lowest: tuple[float, float] | None = None
    height: int = 220

    @property
    def legend(self) -> list[tuple[str, int, Style]]:
        """The curves that need a name."""
        return [(each.name, each.colour, each.style) for each in self.series if each.name]


def draw_inline(chart: Chart) -> str:
    """The chart for a page that carries FIGURE_STYLE; as wide as the place it is put in.

    The element is the frame of the curves alone; what is written around it stands in its margins.
    """
    label, inner = _text(f"{chart.title}. {chart.about}"), _inner(chart)
    return f'<svg class="chart inline" role="img" aria-label="{label}" height="{inner}">{_plot(chart)}</svg>'


def draw_file(chart: Chart) -> str:
    """The chart as a file of its own, with its title, its legend and its colours."""
    head = 30 + (_LEGEND if len(chart.legend) > 1 else 0)
    height = chart.height + head
    title, about = _text(chart.title), _text(chart.about)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" width="{FILE_WIDTH}" height="{height}" '
        f'viewBox="0 0 {FILE_WIDTH} {height}"><title>{title}</title><desc>{about}</desc>'
        f"<style>{_FILE_STYLE}</style>"
        f'<rect class="paper" width="{FILE_WIDTH}" height="{height}" rx="8"/>'
        f'<text class="title" x="16" y="24">{title}</text>{_file_legend(chart)}'
        f'<svg x="{_LEFT}" y="{head + _TOP}" width="{FILE_WIDTH - _LEFT - _RIGHT}" height="{_inner(chart)}" '
        f'overflow="visible">{_plot(chart)}</svg></svg>\n'
    )


def _file_legend(chart: Chart) -> str:
    if len(chart.legend) < 2:
        return ""
    parts, left = [], 16.0
    for name, colour, style in chart.legend:
        parts.append(f'<g class="c{colour}"><path class="{style}" d="M{left:.0f} 42h18"/></g>')
        parts.append(f'<text x="{left + 24:.0f}" y="46">{_text(name)}</text>')
        left += 24 + len(name) * _LETTER + 18
    return "".join(parts)


def _inner(chart: Chart) -> int:
    return chart.height - _TOP - _BOTTOM


def _plot(chart: Chart) -> str:
    """Axes and curves of a frame whose width is given from outside."""
    inner = _inner(chart)
    return (
        f"{''.join(_axes(chart, inner))}"
        f'<svg width="100%" height="{inner}" viewBox="0 0 {_ACROSS} {inner}" preserveAspectRatio="none" '
        'overflow="visible">'
        f"{''.join(_marks(chart, inner))}{''.join(_bins(chart, inner))}{''.join(_curves(chart, inner))}</svg>"
        f"{''.join(_dots(chart, inner))}"
    )


def _axes(chart: Chart, inner: int) -> Iterator[str]:
    x, y = chart.x_axis, chart.y_axis
    for tick, label in zip(y.ticks, y.labels, strict=True):
        at = _number(inner * (1 - y.place(tick)))
        yield f'<line class="grid" x1="0" x2="100%" y1="{at}" y2="{at}"/>'
        yield f'<text x="-8" y="{at}" dy="4" text-anchor="end">{label}</text>'
    yield f'<line class="axis" x1="0" x2="100%" y1="{inner}" y2="{inner}"/>'
    for tick, label in zip(x.ticks, x.labels, strict=True):
        share = x.place(tick)
        yield f'<text x="{_number(share * 100)}%" y="{inner + 17}" text-anchor="middle">{label}</text>'
    yield f'<text x="50%" y="{inner + 34}" text-anchor="middle">{_text(chart.x_label)}</text>'


def _curves(chart: Chart, inner: int) -> Iterator[str]:
    for each in chart.series:
        points = thin(each.points)
        if not len(points):
            continue
        places = [
            f"{_number(chart.x_axis.place(x) * _ACROSS)} {_number(inner * (1 - chart.y_axis.place(y)))}"
            for x, y in points.tolist()
        ]
        style = "faint" if each.style == "faint" else "line"
        yield f'<g class="c{each.colour}"><path class="{style}" d="M{"L".join(places)}"/></g>'


def _dots(chart: Chart, inner: int) -> Iterator[str]:
    """Points that can be pointed at, outside what is stretched, so that they stay round."""
    for each in chart.series:
        if each.style != "dots":
            continue
        for x, y in thin(each.points, 60).tolist():
            where = f'cx="{_number(chart.x_axis.place(x) * 100)}%" cy="{_number(inner * (1 - chart.y_axis.place(y)))}"'
            is_lowest = chart.lowest == (x, y)
            look = ' class="lowest" r="5"' if is_lowest else ' r="3.5"'
            told = f"{each.name}, step {x:,.0f}: {show_number(y, 4)}" + (" (lowest)" if is_lowest else "")
            yield f'<g class="c{each.colour}"><circle {where}{look}><title>{_text(told)}</title></circle></g>'


def _marks(chart: Chart, inner: int) -> Iterator[str]:
    for mark in chart.marks:
        at = _number(chart.x_axis.place(mark.step) * _ACROSS)
        look = "mark bad" if mark.is_bad else "mark"
        yield (f'<line class="{look}" x1="{at}" x2="{at}" y1="0" y2="{inner}"><title>{_text(mark.text)}</title></line>')


def _bins(chart: Chart, inner: int) -> Iterator[str]:
    if chart.bins is None:
        return
    edges = [chart.x_axis.place(edge) * _ACROSS for edge in chart.bins.edges]
    for number, count in enumerate(chart.bins.counts):
        if not count:
            continue
        left, right = edges[number], edges[number + 1]
        # At least a sliver: one row among thousands should still be seen.
        height = max(1.0, inner * chart.y_axis.place(count))
        low, high = chart.bins.edges[number], chart.bins.edges[number + 1] - 1
        told = (
            f"{low:,.0f} to {high:,.0f} tokens: {count:,} rows" if high > low else f"{low:,.0f} tokens: {count:,} rows"
        )
        yield (
            f'<g class="c1"><rect class="bin" x="{_number(left)}" width="{_number(max(0.5, (right - left) * 0.92))}" '
            f'y="{_number(inner - height)}" height="{_number(height)}"><title>{told}</title></rect></g>'
        )


def draw_bar(parts: Sequence[tuple[str, float, str]], whole: float, *, label: str, height: int = 22) -> str:
    """A bar of parts, each a name, a size and the class that colours it; as wide as its place."""
    drawn, left = [], 0.0
    for name, size, look in parts:
        width = 100 * size / whole if whole else 0.0
        if width > 0:
            shown = max(0.25, width)  # one row in a thousand can still be seen
            drawn.append(
                f'<rect class="{look}" x="{_number(left)}%" width="{_number(shown)}%" height="{height}">'
                f"<title>{_text(name)}</title></rect>"
            )
        left += width
    head = f'<svg class="bar" role="img" aria-label="{_text(label)}" width="100%" height="{height}">'
    return f"{head}{''.join(drawn)}</svg>"


def draw_interval(difference: float, low: float, high: float, look: str) -> str:
    """A difference and its interval about zero."""
    reach = max(abs(low), abs(high), abs(difference), 1e-12) * 1.08

    def at(value: float) -> str:
        return _number(50 + 50 * value / reach)

    return (
        f'<svg class="interval {look}" aria-hidden="true" width="120" height="18">'
        f'<line class="zero" x1="50%" x2="50%" y1="0" y2="18"/>'
        f'<line class="reach" x1="{at(low)}%" x2="{at(high)}%" y1="9" y2="9"/>'
        f'<circle cx="{at(difference)}%" cy="9" r="4"/></svg>'
    )


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _text(text: str) -> str:
    """Text of an element or an attribute; XML has no place for control characters, not even escaped."""
    return html.escape(visible(text))
