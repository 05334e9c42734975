"""Write the report of a run into its folder: Markdown, a page, and the figures both show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.reports.drawing import draw_file
from luthier.reports.figures import list_charts
from luthier.reports.html import render_page
from luthier.reports.markdown import render_markdown
from luthier.reports.model import Report, read_report
from luthier.runs.manifest import write_durably
from luthier.runs.run import Run

MARKDOWN = "finetune_report.md"
PAGE = "finetune_report.html"
FIGURES = "figures"


@dataclass(frozen=True)
class ReportPaths:
    """Where a report lies."""

    markdown: Path
    page: Path
    figures: tuple[Path, ...]


def write_report(run: Run) -> ReportPaths:
    """The report of one run, in its own folder; what an earlier one left there is replaced."""
    return write_reports([read_report(run)], run.folder)


def write_reports(reports: Sequence[Report], folder: Path) -> ReportPaths:
    """The report of one run, or of several side by side, in a folder."""
    figures = []
    for chart in list_charts(reports):
        path = folder / FIGURES / f"{chart.name}.svg"
        write_durably(path, draw_file(chart).encode())
        figures.append(path)
    write_durably(folder / MARKDOWN, render_markdown(reports, FIGURES).encode())
    write_durably(folder / PAGE, render_page(reports).encode())
    return ReportPaths(folder / MARKDOWN, folder / PAGE, tuple(figures))
