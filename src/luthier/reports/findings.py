"""What must be known of a comparison to read its numbers: drift, forgetting, contamination, parroting, cut answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from luthier.reports.evidence import Comparison, Drift, Metric, Overlap, Repeats
from luthier.reports.model import Report
from luthier.reports.verdict import Mark
from luthier.reports.words import count_of, show_number, show_share, show_signed

_NONE = "no detectable difference"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for, what was found of it, and whether that is good news."""

    mark: Mark
    label: str
    sentence: str


def list_findings(comparison: Comparison) -> list[Finding]:
    """Everything that was looked for beside the metrics, also where nothing was found."""
    return list(_list_findings(comparison))


def _list_findings(comparison: Comparison) -> Iterator[Finding]:
    if comparison.overlap is not None:
        yield _contamination(comparison.overlap)
    if comparison.repeats is not None and comparison.repeats.answers:
        yield _parroting(comparison.repeats)
    for drift in comparison.drift:
        yield _drift(drift)
    forgetting = comparison.forgetting
    if forgetting is not None and forgetting.name not in {each.name for each in comparison.metrics}:
        yield _forgetting(forgetting)
    if comparison.asked is not None and any(comparison.asked.cut):
        yield _cut(comparison)


def _contamination(found: Overlap) -> Finding:
    label, rows = "contamination", count_of(found.rows, "row")
    if not found.training_rows:
        return Finding("open", label, "No training row could be looked at, so it is not known which of these are.")
    shared = found.same_prompt - found.same_row
    too = f", and {shared:,} more share their prompt with a trained row" if shared > 0 else ""
    if found.same_row:
        were = "was" if found.same_row == 1 else "were"
        said = f"{found.same_row:,} of the {rows} {were} trained{too}: they say nothing about new ones."
        return Finding("bad", label, said)
    if shared > 0:
        verb = "shares its" if shared == 1 else "share their"
        return Finding("warn", label, f"{shared:,} of the {rows} {verb} prompt with a trained row.")
    said = f"None of the {rows}, and none of their prompts, stands among the {found.training_rows:,} trained rows."
    return Finding("good", label, said)


def _parroting(found: Repeats) -> Finding:
    base = f"; of the base, {found.base:,} do" if found.base else ""
    if not found.tuned:
        said = f"No answer of the tuned model repeats a training answer that would be wrong here{base}."
        return Finding("good", "parroting", said)
    verb = "repeats a training answer" if found.tuned == 1 else "repeat training answers"
    said = (
        f"{found.tuned:,} of {count_of(found.answers, 'answer')} {verb} to the letter that would be wrong here{base}."
    )
    return Finding("warn", "parroting", said)


def _drift(found: Drift) -> Finding:
    is_told = found.said not in ("", _NONE)
    if found.name == "refusals":
        shares = " to ".join(show_share(each, 1) if each is not None else "-" for each in (found.base, found.tuned))
        said = f"{found.said.capitalize()} answers refuse" if is_told else "No detectable difference"
        return Finding("warn" if is_told else "good", "refusals", f"{said}: {shares} of them.")
    numbers = f"{show_number(found.base)} to {show_number(found.tuned)} {found.name} on average"
    reach = f" (difference {show_signed(found.low)} to {show_signed(found.high)})"
    said = f"The answers became {found.said}" if is_told else "No detectable difference"
    return Finding("open" if is_told else "good", "length", f"{said}: {numbers}{reach if is_told else ''}.")


def _forgetting(found: Metric) -> Finding:
    numbers = f"{found.name} went from {show_number(found.base)} to {show_number(found.tuned)}"
    reach = f"difference {show_signed(found.low)} to {show_signed(found.high)}"
    mark: Mark = "bad" if found.change == "worse" else "good"
    return Finding(mark, "forgetting", f"{found.change.capitalize()}: {numbers} ({reach}).")


def _cut(comparison: Comparison) -> Finding:
    asked = comparison.asked
    assert asked is not None
    sides = [
        f"{count:,} of the {name}" for name, count in zip(("base", "tuned model"), asked.cut, strict=True) if count
    ]
    said = f"Answers that had not ended after {count_of(asked.max_tokens, 'token')}: {' and '.join(sides)}."
    return Finding("warn", "cut answers", f"{said} --max-tokens lets them go on.")


def list_evidence(report: Report) -> dict[str, str]:
    """What the run proved and how it compares with its base, for a model card: numbers, and nobody's paths."""
    certificate, comparison = report.certificate, report.comparison
    said = (
        f"valid, {count_of(len(certificate.claims), 'claim')} hold" if certificate and certificate.is_valid else "none"
    )
    found = {"certificate": said}
    if comparison is None:
        return found
    for metric in comparison.metrics:
        reach = f" (difference {show_signed(metric.low)} to {show_signed(metric.high)})" if metric.has_interval else ""
        numbers = f"{show_number(metric.base)} in the base, {show_number(metric.tuned)} here"
        found[metric.name] = f"{numbers}: {metric.change}{reach}"
    return found | {each.label: each.sentence for each in list_findings(comparison) if each.label not in found}


def describe_asked(comparison: Comparison) -> str:
    """How the prompts were asked, in a few words; empty where a comparison does not say."""
    asked = comparison.asked
    if asked is None:
        return ""
    how = f"temperature {asked.temperature:g}, seed {asked.seed}, at most {count_of(asked.max_tokens, 'token')}"
    return f"{count_of(asked.prompts, 'prompt')} from {asked.source}: {how}"
