"""`luthier report`: what a run came to, as a page, as Markdown and in a few lines; several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from luthier.cli.output import Command, paint, print_json, print_table, say, warn

if TYPE_CHECKING:
    from luthier.adapters.certificate import Certificate
    from luthier.reports.model import Report
    from luthier.reports.write import ReportPaths

_COLOURS = {"good": "32", "bad": "31", "warn": "33", "open": "36"}
_FOLDER = "finetune_report"


@click.command("report", cls=Command)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "-o",
    "--output-dir",
    metavar="DIR",
    help=f"Write there; else one run into its own folder, several into {_FOLDER}/ here.",
)
def command(runs: tuple[str, ...], output_dir: str | None, as_json: bool) -> None:
    """Say what a RUN came to, and write its report; several are set side by side."""
    from luthier.adapters.certificate import find_certificate
    from luthier.reports.model import read_report
    from luthier.reports.write import write_reports
    from luthier.runs.run import open_run

    opened = [open_run(name) for name in dict.fromkeys(runs)]
    reports = [read_report(run) for run in opened]
    own = opened[0].folder if len(opened) == 1 else Path(_FOLDER)
    paths = write_reports(reports, Path(output_dir).expanduser() if output_dir else own)
    if as_json:
        print_json(_as_dict(reports, paths))
    elif len(reports) == 1:
        _print_one(reports[0], paths, find_certificate(opened[0]))
    else:
        _print_several(reports, paths)


def _print_one(report: Report, paths: ReportPaths, certificate: Certificate | None) -> None:
    """The numbers first, so that the verdict, the proof and the page are the last thing on the screen."""
    from luthier.cli.ending import describe_certificate
    from luthier.reports.advice import list_advice
    from luthier.reports.tables import list_facts
    from luthier.reports.verdict import find_verdict
    from luthier.reports.words import visible

    verdict = find_verdict(report)
    print_table([(fact.label, fact.value, fact.note) for fact in list_facts(report)])
    for remark in report.remarks:
        warn(visible(remark))
    pieces = list_advice(report)
    if pieces:
        say("next")
        for piece in pieces:
            say(f"  {piece.title}: {visible(piece.evidence)}")
            say(f"    {paint(piece.change, '36')}")
    say(paint(visible(verdict.sentence), _COLOURS[verdict.mark]))
    if certificate is not None:
        say(describe_certificate(certificate))
    say(f"report  {paths.page}")


def _print_several(reports: list[Report], paths: ReportPaths) -> None:
    from luthier.reports.figures import letter
    from luthier.reports.tables import find_leader, list_differences, list_overview
    from luthier.reports.words import visible

    say(find_leader(reports))
    print_table([(letter(number), visible(report.run)) for number, report in enumerate(reports)])
    head = ("", *(letter(number) for number in range(len(reports))))
    lines = [(line.label, *map(visible, line.values)) for line in list_overview(reports)]
    columns = tuple(range(1, len(head)))
    print_table([head, *lines], right=columns)
    if differing := list_differences(reports):
        say("settings in which they differ")
        print_table([(line.label, *map(visible, line.values)) for line in differing], right=columns)
    say(f"report  {paths.page}")


def _as_dict(reports: list[Report], paths: ReportPaths) -> dict[str, Any]:
    from luthier.reports.tables import find_leader

    found: dict[str, Any] = {
        "runs": [_run_as_dict(report) for report in reports],
        "page": str(paths.page),
        "markdown": str(paths.markdown),
        "figures": [str(path) for path in paths.figures],
    }
    return found if len(reports) == 1 else {"sentence": find_leader(reports), **found}


def _run_as_dict(report: Report) -> dict[str, Any]:
    from dataclasses import asdict

    from luthier.reports.advice import list_advice
    from luthier.reports.verdict import find_artefact, find_gain, find_verdict

    kept = report.kept
    return {
        "run": report.run,
        "model": report.model,
        "state": report.ending.state,
        "step": report.ending.step,
        "verdict": asdict(find_verdict(report)),
        "artefact": asdict(find_artefact(report)),
        "better": asdict(find_gain(report)),
        "advice": [asdict(piece) for piece in list_advice(report)],
        "rows": {
            **report.rows.places,
            "rows": report.rows.count,
            "reasons": report.rows.reasons,
            "notes": report.rows.notes,
        },
        "tokens": report.rows.tokens,
        "trained_tokens": report.rows.trained_tokens,
        "valid": asdict(kept) if kept else None,
        "cost": {**asdict(report.cost), "tokens_per_second": report.cost.tokens_per_second},
        "remarks": list(report.remarks),
    }
