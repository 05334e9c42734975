"""What to change next, as far as the numbers of a run say it: each piece names its evidence and the setting.

A rule is a function of the report that returns one piece of advice or none. It speaks only where a number stands
behind it, and it proposes a value, not a direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from luthier.data.notes import END_CUT, LEAK, THINKING, TRUNCATED
from luthier.reports.evidence import Comparison, Metric
from luthier.reports.model import Evaluation, Floats, Report
from luthier.reports.verdict import is_overfitted
from luthier.reports.words import count_of, list_words, show_number, show_share
from luthier.spec.method import AdapterKeys

Weight = Literal["act", "consider"]

_FEW_STEPS = 30
_FEW_HELD_OUT = 50
_LOW_LOSS = 0.02
"""Below it held-out rows are as good as solved, and what goes on falling is of no use."""
_SLIGHT = 1.02
"""Perplexity of general text over the base's below which forgetting is worth a thought, and no more."""


@dataclass(frozen=True)
class Advice:
    """One recommendation: what, why, and the setting to change; `act` comes before `consider`."""

    weight: Weight
    title: str
    evidence: str
    setting: str
    change: str


def list_advice(report: Report) -> list[Advice]:
    """Every piece of advice that the numbers bear out, the most pressing first."""
    found = [advice for rule in RULES if (advice := rule(report)) is not None]
    return sorted(found, key=lambda advice: advice.weight != "act")


# -- the course of training ------------------------------------------------------------------------------------


def _losses(report: Report) -> Floats:
    return np.asarray(report.steps.points("loss")[:, 1])


def _mean_of(values: Floats, start: float, end: float) -> float:
    """The median over a part of the steps, given as shares of the whole."""
    first = min(len(values) - 1, int(len(values) * start))
    return float(np.median(values[first : max(first + 1, math.ceil(len(values) * end))]))


def _finite(report: Report) -> list[Evaluation]:
    return [each for each in report.evaluations if math.isfinite(each.loss)]


def overfitting(report: Report) -> Advice | None:
    """Held-out loss rose again while training loss went on falling."""
    evaluations, losses = _finite(report), _losses(report)
    if len(evaluations) < 2 or not len(losses) or report.is_paired:
        return None
    last, best = evaluations[-1], min(evaluations, key=lambda each: each.loss)
    if not is_overfitted(last, best):
        return None
    rise = show_share(last.loss - best.loss, best.loss)
    evidence = (
        f"held-out loss was lowest at step {best.step:,} ({show_number(best.loss)}) and ended {rise} higher "
        f"({show_number(last.loss)}), while training loss ended at {show_number(_mean_of(losses, 0.95, 1))}"
    )
    if report.spec.evaluate.keep == "best":
        shorter = _shorter(report, best.step)
        return Advice("consider", "Train for less time", evidence + "; the best weights were kept", *shorter)
    return Advice("act", "Keep the best weights", evidence, "evaluate.keep", 'evaluate.keep = "best"')


def _shorter(report: Report, step: int) -> tuple[str, str]:
    """The setting that ends the run about that step, and its value."""
    optim, total = report.spec.optim, report.planned_steps or int(report.steps.number[-1])
    if optim.steps:
        return "optim.steps", f"optim.steps = {step}"
    return "optim.epochs", f"optim.epochs = {show_number(max(0.1, optim.epochs * step / total), 2)}"


def still_falling(report: Report) -> Advice | None:
    """Held-out loss was still falling when the run ended."""
    evaluations = _finite(report)
    if len(evaluations) < 3 or report.ending.reason == "early_stop" or report.ending.state != "finished":
        return None
    last, half = evaluations[-1], evaluations[len(evaluations) // 2]
    is_best = last.loss <= min(each.loss for each in evaluations)
    fall = half.loss - last.loss
    if not is_best or last.loss < _LOW_LOSS or half is last or fall < 0.03 * half.loss:
        return None
    optim = report.spec.optim
    setting, value = ("optim.steps", optim.steps * 2) if optim.steps else ("optim.epochs", optim.epochs * 2)
    evidence = (
        f"held-out loss was still falling at the end: from {show_number(half.loss)} at step {half.step:,} to "
        f"{show_number(last.loss)} at step {last.step:,}, its lowest"
    )
    return Advice("consider", "Train longer", evidence, setting, f"{setting} = {value:g}")


def early_stop(report: Report) -> Advice | None:
    """The last part of the run changed nothing that can be measured."""
    evaluations, spec = _finite(report), report.spec
    if len(evaluations) < 3 or spec.evaluate.early_stop_patience is not None or report.is_paired:
        return None
    last, best = evaluations[-1], min(evaluations, key=lambda each: each.loss)
    if is_overfitted(last, best):
        return None
    near = next(each for each in evaluations if each.loss <= best.loss * 1.01 + 0.002)
    saved = last.step - near.step
    if saved < 0.25 * last.step or len([each for each in evaluations if each.step >= near.step]) < 3:
        return None
    evidence = (
        f"held-out loss came to rest at step {near.step:,} ({show_number(near.loss)}; its lowest is "
        f"{show_number(best.loss)}), and the last {saved:,} of {last.step:,} steps changed nothing that counts"
    )
    change = "evaluate.early_stop_patience = 2, and evaluate.min_improvement = 0.002"
    return Advice("consider", "Stop when it no longer gets better", evidence, "evaluate.early_stop_patience", change)


def rate_too_high(report: Report) -> Advice | None:
    """Skipped steps, spikes, or a loss that rose: the steps were too large."""
    losses, rate = _losses(report), report.spec.optim.learning_rate
    if len(losses) < 20 or rate is None:
        return None
    skipped = sum(each.kind == "step_skipped" for each in report.incidents)
    spikes = _count_spikes(losses)
    lowest, end = float(np.min(_running_median(losses))), _mean_of(losses, 0.9, 1)
    if skipped:
        evidence = f"{count_of(skipped, 'step')} had a loss or gradient that was not finite and had to be skipped"
    elif end > 1.25 * lowest and end - lowest > 0.1 and not report.is_paired:
        evidence = (
            f"training loss rose again, from {show_number(lowest)} at its lowest to {show_number(end)} at the end"
        )
    elif spikes >= max(3, 0.02 * len(losses)):
        evidence = f"training loss jumped in {spikes:,} of {len(losses):,} steps, far beyond how it varies otherwise"
    else:
        return None
    change = f"optim.learning_rate = {show_number(rate / 3, 2)} (it was {show_number(rate, 2)})"
    return Advice("act", "Lower the learning rate", evidence, "optim.learning_rate", change)


def _running_median(losses: Floats) -> Floats:
    reach = max(5, min(50, len(losses) // 20))
    windows = np.lib.stride_tricks.sliding_window_view(losses, min(reach, len(losses)))
    return np.asarray(np.median(windows, axis=1))


def _count_spikes(losses: Floats) -> int:
    """Steps whose loss is far above the ten before it, measured by how those vary."""
    windows = np.lib.stride_tricks.sliding_window_view(losses, 10)[:-1]
    middle = np.median(windows, axis=1)
    spread = np.median(np.abs(windows - middle[:, None]), axis=1)
    return int((losses[10:] > 1.5 * middle + 8 * spread + 0.1).sum())


def rate_too_low(report: Report) -> Advice | None:
    """The loss hardly moved."""
    losses, rate = _losses(report), report.spec.optim.learning_rate
    if len(losses) < 20 or rate is None or report.is_paired:
        return None
    start, end = _mean_of(losses, 0, 0.1), _mean_of(losses, 0.9, 1)
    if start < 0.1 or not 0 <= start - end < 0.04 * start:
        return None
    evidence = (
        f"training loss went from {show_number(start)} to {show_number(end)} in {count_of(len(losses), 'step')}: "
        f"only {show_share(start - end, start)}"
    )
    change = f"optim.learning_rate = {show_number(rate * 3, 2)} (it was {show_number(rate, 2)})"
    return Advice("act", "Raise the learning rate", evidence, "optim.learning_rate", change)


def clipped(report: Report) -> Advice | None:
    """Nearly every gradient was cut down to the allowed norm."""
    most = report.spec.optim.max_grad_norm
    norms = report.steps.points("grad_norm")[:, 1]
    late = norms[len(norms) // 4 :]
    if not most or len(late) < 20:
        return None
    cut = int((late > most).sum())
    middle = float(np.median(late))
    if cut < 0.9 * len(late) or middle < 2 * most:
        return None
    evidence = (
        f"{show_share(cut, len(late))} of the gradients after the first quarter were longer than {most:g} and were "
        f"cut; their median norm is {show_number(middle)}"
    )
    change = f"optim.max_grad_norm = {show_number(middle, 2)}, or a larger optim.batch"
    return Advice("consider", "Let gradients through, or average more rows", evidence, "optim.max_grad_norm", change)


def few_steps(report: Report) -> Advice | None:
    """So few optimizer steps that hardly anything can be learned."""
    steps, optim = len(report.steps), report.spec.optim
    if not 0 < steps < _FEW_STEPS or report.ending.state != "finished" or report.ending.reason == "early_stop":
        return None
    rows = report.rows.places["train"]
    evidence = f"the run took {count_of(steps, 'step')} of {count_of(optim.batch, 'example')} over {rows:,} rows"
    if optim.steps:
        change = ("optim.steps", f"optim.steps = {max(100, optim.steps * 3)}")
    elif optim.batch > 4:
        change = ("optim.batch", f"optim.batch = {max(4, optim.batch // 4)}")
    else:
        change = ("optim.epochs", f"optim.epochs = {optim.epochs * 3:g}")
    return Advice("act", "Take more steps", evidence, *change)


def replayed(report: Report) -> Advice | None:
    """Memory ran out, and steps were computed again in smaller parts."""
    count = sum(each.kind == "step_replayed" and "memory" in each.text for each in report.incidents)
    budget = report.spec.compute.micro_batch_tokens
    if not count or budget is None:
        return None
    evidence = f"memory ran out in {count_of(count, 'step')}, each of which was computed again in smaller parts"
    change = f"compute.micro_batch_tokens = {max(256, budget // 2)} (the result is the same)"
    return Advice("consider", "Compute fewer tokens at once", evidence, "compute.micro_batch_tokens", change)


def rank(report: Report) -> Advice | None:
    """The adapter is too narrow for what the rows ask, or wider than what they can fill."""
    method, evaluations, losses = report.spec.method, _finite(report), _losses(report)
    if not isinstance(method, AdapterKeys) or len(losses) < 50 or len(evaluations) < 2 or report.is_paired:
        return None
    last, best = evaluations[-1], min(evaluations, key=lambda each: each.loss)
    if is_overfitted(last, best):
        if method.rank < 32:
            return None
        evidence = (
            f"the run overfitted with {report.trainable_parameters or 0:,} trainable parameters on "
            f"{report.rows.trained_tokens['train']:,} trained tokens"
        )
        change = f"method.rank = {method.rank // 4}"
        return Advice("consider", "Train a narrower adapter", evidence, "method.rank", change)
    start, late, end = _mean_of(losses, 0, 0.05), _mean_of(losses, 0.6, 0.75), _mean_of(losses, 0.85, 1)
    is_flat, has_learnt = abs(late - end) < 0.02 * late, end < 0.9 * start
    gap = last.loss - end
    if not (is_flat and has_learnt and end > 0.5 and gap < 0.05 * end and method.rank <= 32):
        return None
    evidence = (
        f"training loss came to rest at {show_number(end)} (from {show_number(start)}), and held-out loss is as high "
        f"({show_number(last.loss)}): the adapter of rank {method.rank} fits no more, and nothing is memorised"
    )
    return Advice("consider", "Train a wider adapter", evidence, "method.rank", f"method.rank = {method.rank * 2}")


def preference_flat(report: Report) -> Advice | None:
    """The better answer is hardly preferred after training on pairs."""
    if not report.is_paired or not report.evaluations:
        return None
    share, rate = report.evaluations[-1].metrics.get("reward_accuracy"), report.spec.optim.learning_rate
    if share is None or not share < 0.55 or rate is None:
        return None
    evidence = f"the better answer is preferred in {show_share(share, 1)} of the held-out pairs; chance is 50 %"
    change = f"optim.learning_rate = {show_number(rate * 3, 2)} (it was {show_number(rate, 2)})"
    return Advice("act", "Raise the learning rate, and read the pairs", evidence, "optim.learning_rate", change)


# -- the rows --------------------------------------------------------------------------------------------------


def nothing_held_out(report: Report) -> Advice | None:
    """No row was held out, so nothing can be told from memorising."""
    if report.rows.places["valid"] or not report.rows.count:
        return None
    evidence = (
        f"all {report.rows.places['train']:,} usable rows were trained, so learning cannot be told from memorising"
    )
    return Advice("act", "Hold rows out", evidence, "data.valid", "data.valid = 0.05")


def few_held_out(report: Report) -> Advice | None:
    """The held-out part is too small to trust."""
    held, train = report.rows.places["valid"], report.rows.places["train"]
    if not 0 < held < _FEW_HELD_OUT or held + train < 2 * _FEW_HELD_OUT:
        return None
    wanted = min(200, max(_FEW_HELD_OUT, (held + train) // 5))
    evidence = f"{count_of(held, 'row')} held out of {held + train:,}: small differences between runs are chance"
    return Advice("consider", "Hold out more rows", evidence, "data.valid", f"data.valid = {wanted}")


def no_evaluations(report: Report) -> Advice | None:
    """Rows were held out and measured only once."""
    steps = len(report.steps)
    if report.spec.evaluate.every_steps or not report.rows.places["valid"] or steps < _FEW_STEPS:
        return None
    evidence = f"held-out rows were measured only at the end of {steps:,} steps, so nobody sees when it was best"
    change = f"evaluate.every_steps = {max(5, steps // 10)}"
    return Advice("consider", "Measure while training", evidence, "evaluate.every_steps", change)


def too_long(report: Report) -> Advice | None:
    """Rows were dropped for their length."""
    lengths, limit = report.rows.too_long, report.spec.data.max_length
    usable = report.rows.places["train"] + report.rows.places["valid"] + len(lengths)
    if not len(lengths):
        return None
    most = int(np.quantile(lengths, 0.9, method="higher"))
    evidence = (
        f"{count_of(len(lengths), 'row')} ({show_share(len(lengths), usable)}) dropped as longer than {limit:,} "
        f"tokens; nine in ten of them have at most {most:,}"
    )
    weight: Weight = "act" if len(lengths) > 0.02 * usable else "consider"
    return Advice(weight, "Take longer rows", evidence, "data.max_length", f"data.max_length = {_round_up(most)}")


def truncated(report: Report) -> Advice | None:
    """Rows were cut, some before their end of turn."""
    notes, limit = report.rows.notes, report.spec.data.max_length
    cut, ends = notes.get(TRUNCATED, 0), notes.get(END_CUT, 0)
    used = report.rows.places["train"] + report.rows.places["valid"]
    if not cut:
        return None
    lost = f", and {ends:,} of them lost their end-of-turn token, from which a model learns to stop" if ends else ""
    evidence = f"{count_of(cut, 'row')} ({show_share(cut, used)}) cut at {limit:,} tokens{lost}"
    weight: Weight = "act" if ends > 0.02 * used or cut > 0.1 * used else "consider"
    change = f'data.max_length = {limit * 2}, or data.too_long = "drop"'
    return Advice(weight, "Cut fewer rows", evidence, "data.max_length", change)


def unused_context(report: Report) -> Advice | None:
    """All rows are far shorter than the longest that memory is planned for."""
    lengths, limit = report.rows.lengths, report.spec.data.max_length
    if (
        not report.cost.planned_bytes
        or not len(lengths)
        or len(report.rows.too_long)
        or report.rows.notes.get(TRUNCATED)
    ):
        return None
    longest = int(lengths.max())
    wanted = max(64, _round_up(longest))
    if wanted > limit // 2:
        return None
    evidence = (
        f"the longest row has {longest:,} tokens, and data.max_length is {limit:,}: "
        "memory is planned for rows that long"
    )
    return Advice("consider", "Plan for shorter rows", evidence, "data.max_length", f"data.max_length = {wanted}")


def _round_up(tokens: int) -> int:
    """The next power of two, or the one half way to it."""
    power = int(2 ** math.ceil(math.log2(max(8, tokens))))
    return power * 3 // 4 if tokens <= power * 3 // 4 else power


def malformed(report: Report) -> Advice | None:
    """A share of the rows worth mending was dropped for what they are."""
    reasons = {
        name: n for name, n in report.rows.reasons.items() if name not in ("duplicate", "in_validation", "too_long")
    }
    count = sum(reasons.values())
    if count < 0.02 * max(1, report.rows.count):
        return None
    listed = list_words([f"{number:,} {name}" for name, number in list(reasons.items())[:3]])
    evidence = f"{count_of(count, 'row')} ({show_share(count, report.rows.count)}) dropped as malformed: {listed}"
    train = report.spec.data.train
    return Advice(
        "consider", "Mend the rows", evidence, "data.train", f"`luthier data check {train}` lists each with its line"
    )


def leaked(report: Report) -> Advice | None:
    """Held-out prompts are trained, too."""
    count, held = report.rows.notes.get(LEAK, 0), report.rows.places["valid"]
    if not count:
        return None
    evidence = (
        f"{count:,} of {count_of(held, 'held-out row')} have a prompt that is trained too, which flatters every score"
    )
    change = "data.group_by = the key whose equal values belong together"
    return Advice("act" if count > 0.05 * held else "consider", "Split by group", evidence, "data.group_by", change)


def thinking(report: Report) -> Advice | None:
    """The template dropped thinking that the rows hold."""
    count = report.rows.notes.get(THINKING, 0)
    if not count or report.spec.data.unroll:
        return None
    evidence = f"the chat template dropped thinking from {count_of(count, 'row')}, so it was not trained"
    return Advice("consider", "Train the thinking of earlier turns", evidence, "data.unroll", "data.unroll = true")


# -- base against tuned ----------------------------------------------------------------------------------------


def got_worse(report: Report) -> Advice | None:
    """Something the base did better was lost."""
    comparison, rate = report.comparison, report.spec.optim.learning_rate
    if comparison is None or rate is None:
        return None
    worse = [metric for metric in comparison.metrics if metric.change == "worse"]
    if not worse:
        return None
    evidence = f"worse than the base: {list_words([_in_numbers(metric) for metric in worse])}"
    change = f"optim.learning_rate = {show_number(rate / 3, 2)}, or mix general rows into data.train"
    weight: Weight = "consider" if all(_is_slight(metric, comparison) for metric in worse) else "act"
    return Advice(weight, "Forget less", evidence, "optim.learning_rate", change)


def _is_slight(metric: Metric, comparison: Comparison) -> bool:
    """Whether this is the general text, hardly less likely than before: certain, and of no weight."""
    is_general = comparison.forgetting is not None and comparison.forgetting.name == metric.name
    return is_general and (metric.tuned or 0.0) < _SLIGHT * (metric.base or 0.0)


def no_difference(report: Report) -> Advice | None:
    """The comparison could not tell the two models apart."""
    comparison = report.comparison
    if comparison is None or not comparison.metrics:
        return None
    count = len(comparison.metrics)
    if len(comparison.named("no detectable difference")) < count:
        return None
    tested = count_of(len(comparison.answers), "prompt")
    evidence = f"none of {count_of(count, 'metric')} differs beyond its interval on {tested}"
    change = "data.valid = 200, then `luthier compare` again"
    return Advice("act", "Compare on more prompts", evidence, "data.valid", change)


def compared_on_trained(report: Report) -> Advice | None:
    """Rows that were trained were asked in the comparison."""
    overlap = report.comparison.overlap if report.comparison else None
    if overlap is None or not overlap.same_row:
        return None
    evidence = f"trained rows among the {count_of(overlap.rows, 'row')} that were compared on: {overlap.same_row:,}"
    change = "data.train = a file without these rows"
    return Advice("act", "Compare on rows that were not trained", evidence, "data.train", change)


def parroted(report: Report) -> Advice | None:
    """Training answers come back where something else was asked."""
    repeats = report.comparison.repeats if report.comparison else None
    epochs = report.spec.optim.epochs
    if repeats is None or repeats.tuned <= (repeats.base or 0) or repeats.tuned < 0.05 * repeats.answers:
        return None
    evidence = (
        f"{repeats.tuned:,} of {count_of(repeats.answers, 'answer')} repeat a training answer to the letter where it "
        "is wrong: rows were learnt by heart"
    )
    if report.spec.optim.steps:
        change = ("optim.steps", f"optim.steps = {max(1, report.spec.optim.steps // 2)}")
    else:
        change = ("optim.epochs", f"optim.epochs = {show_number(max(0.1, epochs / 2), 2)}")
    return Advice("act", "Learn less by heart", evidence, change[0], f"{change[1]}, and more rows that differ")


def _in_numbers(metric: Metric) -> str:
    if metric.base is None or metric.tuned is None:
        return metric.name
    return f"{metric.name} ({show_number(metric.base)} to {show_number(metric.tuned)})"


RULES: tuple[Callable[[Report], Advice | None], ...] = (
    got_worse,
    compared_on_trained,
    overfitting,
    parroted,
    rate_too_high,
    rate_too_low,
    few_steps,
    preference_flat,
    leaked,
    truncated,
    too_long,
    nothing_held_out,
    no_difference,
    still_falling,
    rank,
    early_stop,
    clipped,
    few_held_out,
    no_evaluations,
    unused_context,
    malformed,
    thinking,
    replayed,
)
