"""What a run came to in one sentence, and the answers to the three questions that follow training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from luthier.reports.evidence import Comparison
from luthier.reports.model import Evaluation, Report
from luthier.reports.words import count_of, list_words, show_number, show_share

Mark = Literal["good", "bad", "warn", "open"]
OVERFIT = 1.05
"""Held-out loss of the last weights over that of the best ones from which a run counts as overfitted."""


@dataclass(frozen=True)
class Verdict:
    """A sentence, and whether it is good news; `open` is what nobody has measured yet."""

    mark: Mark
    sentence: str
    command: str = ""
    """What would answer an open question."""


def find_verdict(report: Report) -> Verdict:
    """The run in one sentence: the worst that is known of it first, else the best that is proved."""
    ending = _ending_verdict(report)
    if ending is not None:
        return ending
    certificate, comparison = find_artefact(report), find_gain(report)
    if certificate.mark == "bad":
        return Verdict("bad", f"Do not use this model: {_lowered(certificate.sentence)}")
    if comparison.mark != "open":
        proof = ", and the artefact is certified" if certificate.mark == "good" else ""
        return Verdict(comparison.mark, comparison.sentence.rstrip(".") + proof + ".")
    learnt = find_learning(report)
    unknown = "whether it is better than the base has not been measured"
    mark: Mark = "open" if learnt.mark == "good" else learnt.mark
    return Verdict(mark, f"{learnt.sentence.rstrip('.')}; {unknown}.", comparison.command)


def _ending_verdict(report: Report) -> Verdict | None:
    ending, total = report.ending, report.planned_steps
    at = f"at step {ending.step:,}" + (f" of {total:,}" if total else "")
    if ending.state == "finished":
        return None
    if ending.state == "failed":
        return Verdict("bad", f"The run failed {at}: {ending.message.rstrip('.') or ending.reason}.")
    if ending.state == "running":
        return Verdict("open", f"The run is {at}; this is how it stands so far.")
    why = f" ({ending.reason})" if ending.reason else ""
    word = "paused" if ending.state == "paused" else "stopped"
    return Verdict("warn", f"The run {word} {at}{why} and can go on.", f"luthier resume {report.folder}")


def find_artefact(report: Report) -> Verdict:
    """Is the artefact what was trained?"""
    certificate = report.certificate
    if certificate is None and (why := report.lineage.get("uncertified")):
        return Verdict("open", f"Not certified: {why}.")
    if certificate is None:
        return Verdict("open", "No certificate yet.", f"luthier verify {report.folder}")
    count = len(certificate.claims)
    if certificate.is_valid:
        what = f"all {count_of(count, 'claim')} hold" if count != 1 else "its one claim holds"
        return Verdict("good", f"Yes: the artefact is what was trained, {what}.")
    if not certificate.broken:
        return Verdict("bad", "The certificate is not valid.", f"luthier verify {report.folder}")
    first = certificate.broken[0]
    word = "does" if len(certificate.broken) == 1 else "do"
    return Verdict(
        "bad",
        f"The artefact is not what was trained: {len(certificate.broken)} of {count_of(count, 'claim')} {word} not "
        f"hold ({first.claim}).",
        f"luthier verify {report.folder}",
    )


def find_gain(report: Report) -> Verdict:
    """Is the tuned model better than the base?"""
    comparison = report.comparison
    if comparison is None:
        return Verdict("open", "Not measured yet.", f"luthier compare {report.folder}")
    found = _gain(report, comparison)
    overlap = comparison.overlap
    if found.mark == "good" and overlap is not None and overlap.same_row:
        were = "was" if overlap.same_row == 1 else "were"
        told = f"but {overlap.same_row:,} of the {overlap.rows:,} rows it was asked {were} trained"
        return Verdict("warn", f"{found.sentence.rstrip('.')}, {told}.")
    return found


def _gain(report: Report, comparison: Comparison) -> Verdict:
    better, worse = comparison.named("better"), comparison.named("worse")
    base = comparison.base_model or report.base
    if not comparison.metrics:
        said = comparison.verdict or "compared by answers alone, without a metric"
        return Verdict("open", f"{said[:1].upper()}{said[1:].rstrip('.')}.")
    if better and worse:
        named = f"better than {base} on {list_words(better)}, but worse on {list_words(worse)}"
        return Verdict("warn", f"The tuned model is {named}.")
    if worse:
        return Verdict("bad", f"The tuned model is worse than {base} on {_measured(comparison, worse)}.")
    if better:
        return Verdict("good", f"The tuned model is better than {base} on {_measured(comparison, better)}.")
    tested = count_of(len(comparison.answers), "prompt")
    return Verdict("warn", f"No difference between the tuned model and {base} could be detected on {tested}.")


def _measured(comparison: Comparison, names: list[str]) -> str:
    """The metrics, the first with its numbers."""
    metric = next(each for each in comparison.metrics if each.name == names[0])
    if metric.base is None or metric.tuned is None:
        return list_words(names)
    first = f"{metric.name} ({show_number(metric.base)} to {show_number(metric.tuned)})"
    return list_words([first, *names[1:]])


def find_learning(report: Report) -> Verdict:
    """What the curves alone say of a finished run."""
    losses = report.steps.points("loss")
    evaluations = [each for each in report.evaluations if math.isfinite(each.loss)]
    if not len(losses):
        return Verdict("warn", "The run finished without a step")
    if not evaluations:
        start, end = losses[0, 1], losses[-1, 1]
        went = "fell" if end < start else "rose"
        said = f"Training loss {went} from {show_number(start)} to {show_number(end)}, and no row was held out"
        return Verdict("warn", f"{said} to tell learning from memorising")
    last, best = evaluations[-1], min(evaluations, key=lambda each: each.loss)
    if is_overfitted(last, best):
        kept = report.spec.evaluate.keep == "best"
        which = f"the weights of step {best.step:,} were kept" if kept else "the last weights were kept"
        rise = show_share(last.loss - best.loss, best.loss)
        return Verdict(
            "good" if kept else "warn",
            f"The run overfitted after step {best.step:,}: held-out loss rose by {rise} from there, and {which}",
        )
    return Verdict("good", _fallen(report, evaluations, last))


def is_overfitted(last: Evaluation, best: Evaluation) -> bool:
    """Whether the last weights are clearly worse on held-out rows than the best ones were."""
    return last.loss > best.loss * OVERFIT and last.loss - best.loss > 0.01


def _fallen(report: Report, evaluations: list[Evaluation], last: Evaluation) -> str:
    if report.is_paired and "reward_accuracy" in last.metrics:
        share = show_share(last.metrics["reward_accuracy"], 1.0)
        return f"Trained to the end: the better answer is preferred in {share} of the held-out pairs"
    ended = "Stopped early" if report.ending.reason == "early_stop" else "Trained to the end"
    first = evaluations[0]
    accuracy = f"{show_share(last.token_accuracy, 1.0)} of held-out tokens predicted right"
    if math.isnan(last.token_accuracy):  # a service does not say which token was likeliest
        accuracy = f"perplexity {show_number(last.perplexity, 4)}"
    if first is last or first.loss <= last.loss:
        return f"{ended}: held-out loss is {show_number(last.loss)}, {accuracy}"
    return (
        f"{ended}: held-out loss fell from {show_number(first.loss)} at step {first.step:,} to "
        f"{show_number(last.loss)}, {accuracy}"
    )


def _lowered(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
