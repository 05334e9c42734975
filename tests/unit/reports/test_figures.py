"""Figures are whole SVG, small for any length of run, and hold foreign names as text."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from luthier.reports.drawing import draw_bar, draw_file, draw_inline, draw_interval
from luthier.reports.figures import letter, list_charts
from luthier.reports.scale import MAX_POINTS
from luthier.reports.tables import list_overview
from tests.unit.reports.made import HOSTILE, Course, ledger, make_report, paired

SVG = "{http://www.w3.org/2000/svg}"


def test_one_run_has_five_figures(tmp_path: Path) -> None:
    charts = list_charts([make_report(tmp_path / "run")])
    assert [chart.name for chart in charts] == ["loss", "learning_rate", "grad_norm", "tokens_per_second", "lengths"]
    assert [name for name, _, _ in charts[0].legend] == ["training loss", "held-out loss"]
    assert charts[0].lowest == (100, 0.5)
    for chart in charts:
        root = ElementTree.fromstring(draw_file(chart))
        assert root.tag == f"{SVG}svg"
        assert root.findtext(f"{SVG}title") == chart.title
        assert "prefers-color-scheme: dark" in (root.findtext(f"{SVG}style") or "")
        assert "@media print" in (root.findtext(f"{SVG}style") or "")
        assert ElementTree.fromstring(draw_inline(chart)).get("role") == "img"


def test_several_runs_share_their_figures(tmp_path: Path) -> None:
    reports = [make_report(tmp_path / name) for name in ("a", "b", "c")]
    charts = list_charts(reports)
    assert [chart.name for chart in charts][:2] == ["loss", "held_out_loss"]
    assert [name for name, _, _ in charts[0].legend] == ["A", "B", "C"]
    assert charts[-1].bins is not None
    assert len(ElementTree.fromstring(draw_file(charts[0])).findall(f".//{SVG}path")) >= 6


REWARDS = ["rewards", "reward_margin", "reward_accuracy"]


def test_a_run_on_pairs_shows_its_rewards(tmp_path: Path) -> None:
    charts = list_charts([make_report(tmp_path / "run", paired(), objective={"kind": "dpo"})])
    assert [chart.name for chart in charts][:4] == ["loss", *REWARDS]
    both, margin, accuracy = charts[1:4]
    assert [name for name, _, _ in both.legend] == ["chosen", "chosen, held out", "rejected", "rejected, held out"]
    assert both.y_axis.low < -1 < 0.4 < both.y_axis.high
    assert [len(each.points) for each in margin.series if each.style == "dots"] == [3]
    assert (accuracy.y_axis.low, accuracy.y_axis.high) == (0, 1)
    for chart in charts:
        ElementTree.fromstring(draw_file(chart))


@pytest.mark.parametrize(
    "course", [Course(metrics={"reward_margin": 1.0}), Course(of_steps=lambda _: {"reward_margin": 1})]
)
def test_only_what_was_measured_is_drawn(course: Course, tmp_path: Path) -> None:
    names = [chart.name for chart in list_charts([make_report(tmp_path / "run", course)])]
    assert [name for name in names if name in REWARDS] == ["reward_margin"]


def test_several_runs_on_pairs_share_their_rewards(tmp_path: Path) -> None:
    courses = {"a": paired(), "b": Course(), "c": paired(30)}
    reports = [make_report(tmp_path / name, course) for name, course in courses.items()]
    charts = {chart.name: chart for chart in list_charts(reports)}
    assert charts.keys() & set(REWARDS) == set(REWARDS[1:])
    assert [len(each.points) for each in charts["reward_margin"].series] == [60, 0, 30]
    line = next(line for line in list_overview(reports) if line.label == "better answer preferred")
    assert line.values == ("100 %", "-", "100 %")


def test_a_long_run_is_thinned(tmp_path: Path) -> None:
    losses = [2.0 + (step * 7919 % 101) / 100 for step in range(9000)]
    chart = list_charts([make_report(tmp_path / "run", Course(losses, {}))])[0]
    drawn = draw_inline(chart)
    curves = re.findall(r' d="([^"]+)"', drawn)
    assert len(curves) == 2
    assert all(curve.count("L") + 1 == MAX_POINTS for curve in curves)
    assert len(drawn) < 70_000


@pytest.mark.parametrize("losses", [[], [None, None], [1.5], [1.0, 1.0], [0.0, 0.0], [1e-12, 1e12]])
def test_odd_runs_can_be_drawn(losses: list[float | None], tmp_path: Path) -> None:
    for chart in list_charts([make_report(tmp_path / "run", Course(losses, {}), ledger(3, 0))]):
        ElementTree.fromstring(draw_file(chart))
        assert "nan" not in draw_inline(chart)


def test_a_run_without_anything_has_no_figures(tmp_path: Path) -> None:
    assert list_charts([make_report(tmp_path / "run", Course([], {}), [])]) == []


def test_foreign_text_in_a_figure_is_text(tmp_path: Path) -> None:
    skipped = {"kind": "step_skipped", "step": 9, "reason": HOSTILE, "rows": [HOSTILE]}
    chart = list_charts([make_report(tmp_path / "run", Course(more=[skipped]))])[0]
    marks = [chart for chart in chart.marks if chart.is_bad]
    assert HOSTILE[:20] in marks[0].text
    for drawn in (draw_inline(chart), draw_file(chart)):
        assert "<img" not in drawn
        assert "<script" not in drawn
        ElementTree.fromstring(drawn)


def test_bars_and_intervals_lie_within_their_place() -> None:
    bar = ElementTree.fromstring(draw_bar([("a", 999_999, "x"), ("b", 1, "y")], 1_000_000, label="<&>"))
    widths = [float(str(rect.get("width")).rstrip("%")) for rect in bar.findall("rect")]
    assert widths == [100.0, 0.25]
    assert draw_bar([("a", 0, "x")], 0, label="none").endswith('height="22"></svg>')
    interval = ElementTree.fromstring(draw_interval(-1, -2, 0.5, "good"))
    places = [float(str(line.get("x1")).rstrip("%")) for line in interval.findall("line")]
    assert places[0] == 50
    assert 0 < places[1] < 50


def test_runs_beyond_the_alphabet_are_numbered() -> None:
    assert [letter(number) for number in (0, 25, 26)] == ["A", "Z", "#27"]
