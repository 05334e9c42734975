"""The report as one page: no script, nothing loaded, and whatever a row says is text in it.

Every value is escaped by the template's autoescape; the content security policy allows the page's own style sheet, by
its hash, and nothing else, so that even what slipped through could not run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

import luthier
from luthier.reports import tables
from luthier.reports.advice import Advice, list_advice
from luthier.reports.drawing import DARK_PALETTE, FIGURE_STYLE, PALETTE, Chart, draw_bar, draw_inline, draw_interval
from luthier.reports.evidence import Metric, choose_answers
from luthier.reports.figures import colour, letter, list_charts
from luthier.reports.findings import describe_asked, list_findings
from luthier.reports.model import Report
from luthier.reports.verdict import Verdict, find_artefact, find_gain, find_verdict
from luthier.reports.words import clip, count_of, show_bytes, show_number, show_share, show_signed, visible

LOOKS = {"better": "good", "worse": "bad", "no detectable difference": "open"}
_SHOWN_INCIDENTS = 12


def render_page(reports: Sequence[Report]) -> str:
    """The page of one run, or of several side by side."""
    return _render_run(reports[0]) if len(reports) == 1 else _render_runs(reports)


def _render_run(report: Report) -> str:
    charts = list_charts([report])
    lengths = next((chart for chart in charts if chart.name == "lengths"), None)
    rows = report.rows
    pieces = list_advice(report)
    facts: dict[str, Any] = {
        "title": f"{report.run}: fine-tuning report",
        "report": report,
        "verdict": find_verdict(report),
        "answers": _answers(report, pieces),
        "artefact": find_artefact(report),
        "facts": tables.list_facts(report),
        "pieces": pieces,
        "incidents": _list_incidents(report),
        "subject": tables.list_subject(report),
        "places": tables.list_places(report),
        "ledger": tables.ledger_sum(report),
        "ledger_bar": _ledger_bar(report),
        "share": show_share(rows.trained_tokens["train"], rows.tokens["train"]),
        "share_bar": _share_bar(report),
        "lengths": tables.list_lengths(report),
        "lengths_chart": lengths,
        "notes": tables.list_notes(report),
        "reasons": tables.list_reasons(report),
        "charts": [chart for chart in charts if chart is not lengths],
        "comparison": report.comparison,
        "looks": LOOKS,
        "cost": tables.list_cost(report),
        "lineage": tables.list_lineage(report),
        "settings": tables.list_settings(report),
        "footer": _footer(report.folder),
        **_memory(report),
        **_compared(report),
    }
    return _render("run.html.jinja", facts)


def _answers(report: Report, pieces: list[Advice]) -> list[tuple[str, Verdict]]:
    """The three questions that follow training."""
    return [
        ("Is the artefact what was trained?", find_artefact(report)),
        ("Is it better than the base?", find_gain(report)),
        ("What should be done next?", _next(pieces)),
    ]


def _next(pieces: list[Advice]) -> Verdict:
    if not pieces:
        return Verdict("good", "Nothing in the numbers asks for a change.")
    more = f", and {count_of(len(pieces) - 1, 'more suggestion')}" if len(pieces) > 1 else ""
    return Verdict("warn" if pieces[0].weight == "act" else "open", f"{pieces[0].title}{more}.")


def _list_incidents(report: Report) -> list[str]:
    texts = [each.text for each in report.incidents]
    more = len(texts) - _SHOWN_INCIDENTS
    return texts if more <= 0 else [*texts[:_SHOWN_INCIDENTS], f"and {more:,} more, in events.jsonl"]


def _ledger_bar(report: Report) -> Markup:
    places = tables.list_places(report)
    parts = [(f"{name}: {count:,} rows", float(count), f"part{n}") for n, (name, count, _, _) in enumerate(places, 1)]
    return Markup(draw_bar(parts, report.rows.count, label=tables.ledger_sum(report)))  # noqa: S704 - escaped there


def _share_bar(report: Report) -> Markup:
    trained, tokens = report.rows.trained_tokens["train"], report.rows.tokens["train"]
    label = f"{trained:,} of {tokens:,} training tokens are trained"
    return Markup(draw_bar([(label, trained, "part1")], tokens, label=label, height=10))  # noqa: S704 - escaped there


def _memory(report: Report) -> dict[str, Any]:
    """The planned memory item by item, and the measured one to the same scale."""
    cost = report.cost
    items = {name: size for name, size in cost.memory_items.items() if size}
    if not items:
        return {"memory_parts": []}
    correction = (cost.planned_bytes or 0) / max(1, sum(items.values())) or 1.0
    whole = max(cost.planned_bytes or 0, cost.measured_bytes or 0, 1)
    looks = [f"part{number % 6 + 1}" for number in range(len(items))]
    named = list(zip(items.items(), looks, strict=True))
    parts = [(f"{name}: {show_bytes(size)}", size * correction, look) for (name, size), look in named]
    found: dict[str, Any] = {
        "memory_parts": [(name, show_bytes(size), look.replace("part", "part-")) for (name, size), look in named],
        "planned_said": f"Memory planned: {show_bytes(cost.planned_bytes or 0)}",
        "memory_bar": Markup(draw_bar(parts, whole, label="memory as planned")),  # noqa: S704 - escaped there
    }
    if cost.measured_bytes:
        label = f"Memory measured: {show_bytes(cost.measured_bytes)}"
        found["measured_said"] = label
        found["measured_bar"] = Markup(  # noqa: S704 - escaped there
            draw_bar([(label, cost.measured_bytes, "part3")], whole, label=label)
        )
    return found


def _compared(report: Report) -> dict[str, Any]:
    comparison = report.comparison
    if comparison is None:
        return {"examples": [], "findings": [], "asked": ""}
    count = len(comparison.answers)
    shown = choose_answers(comparison.answers)
    by = comparison.score or "score"
    is_ranked = any(why for why, _ in shown)
    how = f"by {by}: best, median and worst" if is_ranked else "the first ones, since no score tells them apart"
    return {
        "examples": shown,
        "examples_head": f"{len(shown)} of {count_of(count, 'answer')}, {how}",
        "findings": list_findings(comparison),
        "asked": describe_asked(comparison),
    }


def _render_runs(reports: Sequence[Report]) -> str:
    runs = [
        {
            "letter": letter(number),
            "look": f"c{colour(number)}",
            "report": report,
            "verdict": find_verdict(report),
            "pieces": list_advice(report),
        }
        for number, report in enumerate(reports)
    ]
    facts = {
        "title": f"{len(reports)} runs: fine-tuning report",
        "mark": "good" if tables.are_comparable(reports) else "warn",
        "sentence": tables.find_leader(reports),
        "runs": runs,
        "lines": tables.list_overview(reports),
        "differences": tables.list_differences(reports),
        "charts": list_charts(reports),
        "footer": _footer(*(report.folder for report in reports)),
    }
    return _render("runs.html.jinja", facts)


def _footer(*names: str) -> str:
    return f"Made by Luthier {luthier.__version__} from {', '.join(names)}."


def _render(template: str, facts: dict[str, Any]) -> str:
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    loader = jinja2.PackageLoader("luthier.reports", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown)
    environment.filters |= {
        "clip": clip,
        "counts": tables.show_counts,
        "draw": _draw,
        "interval": _draw_interval,
        "number": show_number,
        "signed": show_signed,
    }
    page = environment.get_template(template)
    return page.render(facts, style=Markup(style), style_hash=Markup(f"sha256-{digest}"))  # noqa: S704 - our own


def _shown(value: Any) -> Any:
    """What a value prints as: foreign text with its unseen characters spelled out."""
    return visible(value) if type(value) is str else value


def _style() -> str:
    sheet = (files("luthier.reports") / "page.css").read_text("utf-8")
    parts = "".join(f".part-{number} {{ color: var(--c{n}); }}\n" for number, n in enumerate((1, 2, 8, 3, 4, 5), 1))
    light = f"{PALETTE}  --page: #f8f9fb; --tint: #eceff3;"
    dark = f"{DARK_PALETTE}  --page: #0d1014; --tint: #232932;"
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f"{FIGURE_STYLE}{parts}{sheet}"
        f"@media print {{ :root {{ color-scheme: light; {light} --page: #fff; }} }}\n"
    )


def _draw(chart: Chart) -> Markup:
    return Markup(draw_inline(chart))  # noqa: S704 - drawing escapes every text of it


def _draw_interval(metric: Metric) -> Markup:
    assert metric.difference is not None
    assert metric.low is not None
    assert metric.high is not None
    look = LOOKS[metric.change]
    return Markup(draw_interval(metric.difference, metric.low, metric.high, look))  # noqa: S704 - numbers only
