"""The report as Markdown, for places that show it as text: a pull request, a terminal, a repository."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import luthier
from luthier.reports import tables
from luthier.reports.advice import Advice, list_advice
from luthier.reports.drawing import Chart
from luthier.reports.evidence import Answer, Comparison, choose_answers
from luthier.reports.figures import letter, list_charts
from luthier.reports.findings import describe_asked, list_findings
from luthier.reports.model import Report
from luthier.reports.verdict import find_artefact, find_gain, find_verdict
from luthier.reports.words import clip, count_of, show_number, show_share, show_signed, visible

# An underscore inside a word means nothing to Markdown, and names of settings are full of them.
_SPECIAL = re.compile(r"([\\`*{}\[\]<>|#~!&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
_SHOWN = 1200
_MARKS = {"good": "", "open": "", "warn": "**look here**", "bad": "**look here**"}
_TAGS = {True: "holds", False: "**does not hold**"}


def render_markdown(reports: Sequence[Report], figures: str = "figures") -> str:
    """The report of one run, or of several side by side; figures are linked from the folder of that name."""
    lines = _of_run(reports[0], figures) if len(reports) == 1 else _of_runs(reports, figures)
    return "\n".join(lines).rstrip() + "\n"


def plain(text: str) -> str:
    """Foreign text that stays text in Markdown, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(visible(text).split()))


def _of_run(report: Report, figures: str) -> Iterator[str]:
    verdict = find_verdict(report)
    yield from (f"# {plain(verdict.sentence)}", "", f"Run `{report.run}`", "")
    artefact, gain = find_artefact(report), find_gain(report)
    for question, answer in (("Is the artefact what was trained?", artefact), ("Is it better than the base?", gain)):
        more = f" Run {_code(answer.command)}." if answer.command else ""
        yield f"- **{question}** {plain(answer.sentence)}{more}"
    for fact in tables.list_facts(report):
        note = f" ({plain(fact.note)})" if fact.note else ""
        yield f"- {plain(fact.label)}: **{plain(fact.value)}**{note}"
    yield ""
    known = [*report.remarks, *(each.text for each in report.incidents[:12])]
    if known:
        yield from ("## Worth knowing", "", *(f"- {plain(text)}" for text in known), "")
    yield from ("## What to do next", "", *_advice(list_advice(report)), "")
    charts = list_charts([report])
    yield from _rows(report, [chart for chart in charts if chart.name == "lengths"], figures)
    curves = [chart for chart in charts if chart.name != "lengths"]
    if curves:
        yield from ("## Curves", "", *_figures(curves, figures))
    if report.comparison is not None:
        yield from _comparison(report.comparison)
    if report.certificate is not None:
        yield from ("## Certificate", "", "Valid." if report.certificate.is_valid else "**Not valid.**", "")
        claims = [(each.claim, each.found, each.allowed, _TAGS[each.holds]) for each in report.certificate.claims]
        yield from _table(("claim", "found", "allowed", ""), claims, raw=(3,))
    yield from ("## Cost", "", *_table(("", "planned", "measured"), tables.list_cost(report), right=(1, 2)))
    yield from ("## Lineage", "", *_table(("", ""), tables.list_lineage(report)))
    yield from ("## Settings", "", *_table(("key", "value"), tables.list_settings(report)))
    yield f"Made by Luthier {luthier.__version__}; `finetune_report.html` is the same as a page."


def _rows(report: Report, charts: list[Chart], figures: str) -> Iterator[str]:
    yield from ("## What was trained on what", "", *_table(("", ""), tables.list_subject(report)))
    places = [(name, *(f"{count:,}" for count in counts)) for name, *counts in tables.list_places(report)]
    yield from _table(("", "rows", "tokens", "trained tokens"), places, right=(1, 2, 3))
    share = show_share(report.rows.trained_tokens["train"], report.rows.tokens["train"])
    yield from (f"{tables.ledger_sum(report)}. {share} of the training tokens are trained.", "")
    if lengths := tables.list_lengths(report):
        yield from (f"Length of the rows: {lengths}.", "", *_figures(charts, figures))
    notes = tables.list_notes(report)
    if notes:
        yield from (*(f"- {plain(note)}" for note in notes), "")
    reasons = tables.list_reasons(report)
    if not reasons:
        return
    yield from ("### Dropped rows by reason", "")
    told = [(each.name, f"{each.count:,}", each.sentence, each.where) for each in reasons]
    yield from _table(("reason", "rows", "what it means", "where"), told, right=(1,))
    for each in report.rows.examples:
        yield f"Row {plain(each.where)}, {plain(each.reason)}: {plain(each.message)}"
        yield from ("", *(_fence(clip(each.row, 600)) if each.row else ()))


def _comparison(comparison: Comparison) -> Iterator[str]:
    yield from ("## Base against tuned", "")
    if comparison.verdict:
        yield from (plain(comparison.verdict), "")
    if asked := describe_asked(comparison):
        yield from (f"{plain(asked)}.", "")
    rows = [
        (
            each.name,
            show_number(each.base),
            show_number(each.tuned),
            show_signed(each.difference),
            f"{show_signed(each.low)} to {show_signed(each.high)}" if each.has_interval else "",
            tables.show_counts(each),
            each.change,
        )
        for each in comparison.metrics
    ]
    if rows:
        head = ("metric", "base", "tuned", "difference", "95 % interval", "won / even / lost", "")
        yield from _table(head, rows, right=(1, 2, 3, 5))
    found = [(each.label, each.sentence, _MARKS[each.mark]) for each in list_findings(comparison)]
    if found:
        yield from ("### What else was looked for", "", *_table(("", "found", ""), found, raw=(2,)))
    if comparison.notes:
        yield from (*(f"- {plain(note)}" for note in comparison.notes), "")
    shown = choose_answers(comparison.answers)
    if shown:
        yield from (f"### {len(shown)} of {count_of(len(comparison.answers), 'answer')}", "")
    for number, (why, answer) in enumerate(shown, 1):
        yield from _answer(f"{number}, {why}" if why else str(number), answer)


def _answer(name: str, answer: Answer) -> Iterator[str]:
    parts = [
        ("Prompt", answer.prompt, None),
        ("Base", answer.base, answer.base_score),
        ("Tuned", answer.tuned, answer.tuned_score),
        ("Reference", answer.reference, None),
    ]
    yield from (f"#### {name}", "")
    for title, text, score in parts:
        if text is not None:
            scored = f", score {show_number(score)}" if score is not None else ""
            said = _fence(clip(text, _SHOWN)) if text.strip() else ["(an empty answer)", ""]
            yield from (f"{title}{scored}:", "", *said)


def _of_runs(reports: Sequence[Report], figures: str) -> Iterator[str]:
    letters = [letter(number) for number in range(len(reports))]
    yield from (f"# {plain(tables.find_leader(reports))}", "")
    named = [(name, report.run, find_verdict(report).sentence) for name, report in zip(letters, reports, strict=True)]
    yield from _table(("", "run", "verdict"), named)
    for title, lines in (
        ("What the runs came to", tables.list_overview(reports)),
        ("Settings in which they differ", tables.list_differences(reports)),
    ):
        if lines:
            yield from (f"## {title}", "")
            cells = [
                (
                    plain(line.label),
                    *(f"**{plain(v)}**" if n in line.best else plain(v) for n, v in enumerate(line.values)),
                )
                for line in lines
            ]
            columns = range(len(reports) + 1)
            yield from _table(("", *letters), cells, right=tuple(columns)[1:], raw=tuple(columns))
    yield from ("## Curves", "", *_figures(list_charts(reports), figures))
    for name, report in zip(letters, reports, strict=True):
        yield from (f"## {name}: what to do next", "", *_advice(list_advice(report)), "")
    yield f"Made by Luthier {luthier.__version__}; `finetune_report.html` is the same as a page."


def _advice(pieces: Iterable[Advice]) -> list[str]:
    lines = [
        f"{number}. **{plain(each.title)}**: {plain(each.evidence)}. Set {_code(each.change)}."
        for number, each in enumerate(pieces, 1)
    ]
    return lines or ["Nothing in the numbers asks for a change."]


def _figures(charts: Iterable[Chart], folder: str) -> Iterator[str]:
    for chart in charts:
        yield from (f"![{plain(chart.title)}. {plain(chart.about)}]({folder}/{chart.name}.svg)", "")


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = (), raw: Sequence[int] = ()
) -> list[str]:
    """A table and the empty line behind it; the columns in `raw` hold Markdown of our own."""
    rule = "|".join("---:" if column in right else "---" for column in range(len(head)))
    lines = [f"| {' | '.join(head)} |", f"|{rule}|"]
    for row in rows:
        cells = (cell if column in raw else plain(cell) for column, cell in enumerate(row))
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _fence(text: str) -> list[str]:
    """A block of foreign text behind a fence that it cannot close."""
    shown = visible(text)
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", shown, fence, ""]


def _code(text: str) -> str:
    """Text of ours as code; it may name a folder, whose name may hold a backtick."""
    shown = " ".join(visible(text).split())
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{shown}{space}{fence}"
