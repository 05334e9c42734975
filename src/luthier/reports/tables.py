"""The tables of a report, in words: the same for the page, the Markdown and the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.data.notes import NOTES
from luthier.data.reasons import REASONS
from luthier.reports.evidence import Metric
from luthier.reports.figures import letter
from luthier.reports.model import Report
from luthier.reports.rows import PLACES
from luthier.reports.words import MISSING, count_of, show_bytes, show_number, show_seconds, show_share
from luthier.spec.method import AdapterKeys

PLACE_WORDS = {"train": "trained", "valid": "held out", "dropped": "dropped"}
_HASH = 12


@dataclass(frozen=True)
class Fact:
    """One number of the strip under the verdict, and what stands beside it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Reason:
    """Why rows were dropped: how many, what that means, and where the first ones stand."""

    name: str
    count: int
    sentence: str
    where: str


def list_facts(report: Report) -> list[Fact]:
    """The few numbers worth seeing first."""
    facts, kept, cost = [], report.kept, report.cost
    first = report.evaluations[0] if report.evaluations else None
    if kept is not None:
        since = f"{show_number(first.loss)} at step {first.step:,}" if first and first is not kept else ""
        facts.append(Fact("held-out loss", show_number(kept.loss), since))
        if report.is_paired and "reward_accuracy" in kept.metrics:
            facts.append(Fact("better answer preferred", show_share(kept.metrics["reward_accuracy"], 1), "held out"))
        elif math.isnan(kept.token_accuracy):
            facts.append(Fact("perplexity", show_number(kept.perplexity, 4), "held out"))
        else:
            right = show_share(kept.token_accuracy, 1)
            facts.append(Fact("tokens right", right, f"held out; perplexity {show_number(kept.perplexity, 4)}"))
    elif len(report.steps):
        losses = report.steps.points("loss")[:, 1]
        if len(losses):
            facts.append(
                Fact("training loss", show_number(float(losses[-1])), f"{show_number(float(losses[0]))} at first")
            )
    total = report.planned_steps
    facts.append(
        Fact("steps", f"{len(report.steps):,}", f"of {total:,}" if total and total != len(report.steps) else "")
    )
    facts.append(Fact("training", show_seconds(cost.seconds), f"{cost.tokens_per_second:,.0f} tokens/s"))
    facts.append(Fact("tokens", _thousands(cost.tokens), f"{_thousands(cost.trained_tokens)} of them trained"))
    if cost.measured_bytes:
        facts.append(Fact("peak memory", show_bytes(cost.measured_bytes), cost.device))
    return facts


def _thousands(count: int) -> str:
    if count < 1_000_000:
        return f"{count:,}"
    return f"{show_number(count / 1e6)} million" if count < 1e9 else f"{show_number(count / 1e9)} billion"


def list_subject(report: Report) -> list[tuple[str, str]]:
    """What was trained, how, and on which rows."""
    spec, rows = report.spec, report.rows
    optim, method = spec.optim, spec.method
    found = [("base", report.base), ("method", method.kind)]
    if isinstance(method, AdapterKeys):
        targets = method.targets if isinstance(method.targets, list) else [method.targets]
        found[-1] = ("method", f"{method.kind}, rank {method.rank}, alpha {method.alpha:g}, dropout {method.dropout:g}")
        found.append(("adapted layers", ", ".join(targets)))
    if report.trainable_parameters and report.total_parameters:
        share = show_share(report.trainable_parameters, report.total_parameters)
        numbers = f"{report.trainable_parameters:,} of {report.total_parameters:,} parameters ({share})"
        found.append(("trained", numbers))
    found.append(("objective", spec.objective.kind))
    named = ", ".join(rows.files[:4]) + (f" and {len(rows.files) - 4} more" if len(rows.files) > 4 else "")
    found.append(("rows from", named or str(spec.data.train or MISSING)))
    if rows.used_tokens:
        share = f"{rows.trained_share:.1%}".replace("%", " %")
        trained, tokens = rows.trained_tokens["train"], rows.tokens["train"]
        found.append(("trained tokens", f"{trained:,} of {tokens:,} an epoch ({share}), {spec.data.train_on}"))
    length = f"{optim.steps:,} steps" if optim.steps else f"{optim.epochs:g} epochs"
    found.append(("length", f"{length}, {optim.batch} examples a step"))
    rate = show_number(optim.learning_rate)
    found.append(("learning rate", f"{rate}, {optim.schedule} after {optim.warmup_steps or 0} warm-up steps"))
    found.append(("optimizer", f"{optim.kind}, {spec.compute.precision}, engine {spec.engine.kind}"))
    return found


def list_places(report: Report) -> list[tuple[str, int, int, int]]:
    """Where every row went: the place, rows, tokens, trained tokens."""
    rows = report.rows
    return [(PLACE_WORDS[name], rows.places[name], rows.tokens[name], rows.trained_tokens[name]) for name in PLACES]


def ledger_sum(report: Report) -> str:
    """The ledger as a sum that can be checked."""
    total = " + ".join(f"{report.rows.places[name]:,}" for name in PLACES)
    return f"{total} = {count_of(report.rows.count, 'row')}: every row is in exactly one place"


def list_reasons(report: Report) -> list[Reason]:
    """Why rows were dropped, the most frequent reason first."""
    found = []
    for name, count in report.rows.reasons.items():
        places = report.rows.where.get(name, ())
        more = ", ..." if count > len(places) else ""
        sentence = REASONS[name].sentence if name in REASONS else ""
        found.append(Reason(name, count, sentence, ", ".join(places) + more))
    return found


def list_notes(report: Report) -> list[str]:
    """What the ledger remarks on rows that are used all the same."""
    return [f"{count_of(count, 'row')}: {NOTES.get(name, name)}" for name, count in report.rows.notes.items()]


def list_lengths(report: Report) -> str:
    """The lengths of the rows in a few numbers."""
    lengths = report.rows.lengths
    if not len(lengths):
        return ""
    named = {"shortest": 0.0, "median": 0.5, "90 % within": 0.9, "99 % within": 0.99, "longest": 1.0}
    at = np.quantile(lengths, list(named.values()), method="higher")
    shown = ", ".join(f"{name} {length:,}" for name, length in zip(named, at.tolist(), strict=True))
    return f"{shown} tokens (data.max_length {report.spec.data.max_length:,})"


def list_cost(report: Report) -> list[tuple[str, str, str]]:
    """Time, tokens and memory: what the plan said, and what it came to."""
    cost = report.cost
    planned = show_seconds(cost.planned_seconds) if cost.planned_seconds is not None else MISSING
    found = [("training", planned, show_seconds(cost.seconds))]
    if cost.load_seconds:
        found.append(("loading the model", MISSING, show_seconds(cost.load_seconds)))
    if cost.wall_seconds:
        found.append(("from start to end", MISSING, show_seconds(cost.wall_seconds)))
    found.append(("tokens computed", MISSING, f"{cost.tokens:,}"))
    found.append(("tokens trained", MISSING, f"{cost.trained_tokens:,}"))
    if cost.repeated_tokens:
        found.append(("tokens computed again after a stop", MISSING, f"{cost.repeated_tokens:,}"))
    found.append(("tokens per second", MISSING, f"{cost.tokens_per_second:,.0f}"))
    memory = [show_bytes(size) if size else MISSING for size in (cost.planned_bytes, cost.measured_bytes)]
    if memory != [MISSING, MISSING]:
        found.append(("peak memory", memory[0], memory[1]))
    if cost.available_bytes:
        found.append((f"memory of {cost.device or 'the device'}", MISSING, f"{show_bytes(cost.available_bytes)} free"))
    return found


def list_lineage(report: Report) -> list[tuple[str, str]]:
    """Where the result comes from, by hashes."""
    lineage = report.lineage
    base, data, plan = (lineage.get(name, {}) for name in ("base", "data", "plan"))
    revision = f" at {base['revision']}" if base.get("revision") else ""
    found = [
        ("result", report.model),
        ("base", f"{report.base}{revision}{_hashed(base)}"),
        ("data", f"{data.get('train') or MISSING}{_hashed(data)}"),
        ("plan", f"{plan.get('method', report.spec.method.kind)}, seed {report.spec.seed}{_hashed(plan)}"),
        ("parents", ", ".join(map(str, lineage.get("parents", []))) or "none"),
    ]
    if lineage.get("created"):
        found.append(("started", str(lineage["created"])))
    if lineage.get("finished"):
        found.append(("finished", str(lineage["finished"])))
    versions = lineage.get("versions", {})
    if versions:
        found.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return [*found, ("folder", report.folder)]


def _hashed(table: dict[str, Any]) -> str:
    digest = table.get("hash")
    return f" (sha256 {str(digest)[:_HASH]})" if digest else ""


def list_settings(report: Report) -> list[tuple[str, str]]:
    """Every key that decided the run."""
    return [(key, show_setting(value)) for key, value in report.settings().items() if value is not None]


def show_setting(value: Any) -> str:
    """A value of the spec as it is written there, or nearly."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: MISSING}[value]
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def show_counts(metric: Metric) -> str:
    """Rows won, even and lost."""
    return " / ".join(f"{count:,}" for count in metric.counts) if metric.counts else ""


# -- several runs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of the table of several runs; `best` are the columns that are the best of the line."""

    label: str
    values: tuple[str, ...]
    best: tuple[int, ...] = ()


def list_overview(reports: Sequence[Report]) -> list[Line]:
    """What the runs came to, a column for each."""
    losses = [report.kept.loss if report.kept else None for report in reports]
    is_fair = are_comparable(reports)
    seconds = [report.cost.seconds or None for report in reports]
    memory = [float(report.cost.measured_bytes) if report.cost.measured_bytes else None for report in reports]
    lines = [
        Line("state", tuple(_state(report) for report in reports)),
        Line("base", tuple(report.base for report in reports)),
        Line("method", tuple(report.spec.method.kind for report in reports)),
        Line("rows trained", tuple(f"{report.rows.places['train']:,}" for report in reports)),
        Line("steps", tuple(f"{len(report.steps):,}" for report in reports)),
        _ranked("held-out loss", losses, show_number, is_ranked=is_fair),
        Line(
            "tokens right", tuple(show_share(each.kept.token_accuracy, 1) if each.kept else MISSING for each in reports)
        ),
        *_preferred(reports),
        Line("training loss", tuple(_last_loss(report) for report in reports)),
        _ranked("training time", seconds, show_seconds, is_ranked=False),
        Line("tokens per second", tuple(f"{report.cost.tokens_per_second:,.0f}" for report in reports)),
        _ranked("peak memory", memory, show_bytes, is_ranked=False),
        Line("trained parameters", tuple(f"{report.trainable_parameters or 0:,}" for report in reports)),
        Line("certificate", tuple(_certified(report) for report in reports)),
    ]
    return lines


def _preferred(reports: Sequence[Report]) -> list[Line]:
    """How often the better answer of a held-out pair is preferred, where any run learns from pairs."""
    shares = [report.kept.metrics.get("reward_accuracy") if report.kept else None for report in reports]
    if all(share is None for share in shares):
        return []
    shown = (MISSING if share is None else show_share(share, 1) for share in shares)
    return [Line("better answer preferred", tuple(shown))]


def are_comparable(reports: Sequence[Report]) -> bool:
    """Whether one held-out loss can be held against another: the same rows, held out alike, and one objective."""
    hashes = {report.data_hash for report in reports}
    return len(hashes) == 1 and "" not in hashes and len({report.spec.objective.kind for report in reports}) == 1


def _state(report: Report) -> str:
    ending = report.ending
    return ending.state if ending.reason in ("", "finished", ending.state) else f"{ending.state} ({ending.reason})"


def _last_loss(report: Report) -> str:
    losses = report.steps.points("loss")
    return show_number(float(losses[-1, 1])) if len(losses) else MISSING


def _certified(report: Report) -> str:
    return MISSING if report.certificate is None else "valid" if report.certificate.is_valid else "not valid"


def _ranked(label: str, values: Sequence[float | None], show: Callable[[float], str], *, is_ranked: bool) -> Line:
    """Numbers, the lowest of them marked unless all are the same."""
    known = [value for value in values if value is not None]
    shown = tuple(MISSING if value is None else show(value) for value in values)
    if not is_ranked or len(known) < 2 or min(known) == max(known):
        return Line(label, shown)
    return Line(label, shown, tuple(n for n, value in enumerate(values) if value == min(known)))


def list_differences(reports: Sequence[Report]) -> list[Line]:
    """The settings in which the runs differ."""
    found = [report.settings() for report in reports]
    keys = dict.fromkeys(key for settings in found for key in settings)
    lines = []
    for key in keys:
        values = tuple(show_setting(settings.get(key)) for settings in found)
        if len(set(values)) > 1:
            lines.append(Line(key, values))
    return lines


def find_leader(reports: Sequence[Report]) -> str:
    """Which of several runs is best on held-out rows, in one sentence."""
    if not are_comparable(reports):
        return "These runs were not measured on the same held-out rows, so their losses cannot be ranked."
    losses = {letter(n): report.kept.loss for n, report in enumerate(reports) if report.kept}
    if len(losses) < 2:
        return "Fewer than two of these runs measured held-out rows, so they cannot be ranked."
    ranked = sorted(losses, key=lambda name: losses[name])
    best, second, last = (losses[ranked[place]] for place in (0, 1, -1))
    if best == last:
        return f"All of these runs end at the same held-out loss, {show_number(best)}."
    if best == second:
        tied = [name for name in ranked if losses[name] == best]
        return f"{' and '.join(tied)} share the lowest held-out loss, {show_number(best)}."
    return f"{ranked[0]} has the lowest held-out loss, {show_number(best)}; {ranked[1]} is next, {show_number(second)}."
