"""`luthier evaluate`: measure a model on held-out rows, alone or beside what it started from or another model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from luthier.cli.output import Command, print_json, print_table, progress_bar, say, warn

if TYPE_CHECKING:
    from luthier.evals.exact_match import Answer, ExactMatch
    from luthier.evals.perplexity import Perplexity
    from luthier.evals.scores import Scores
    from luthier.workflow import Evaluated

_TAIL = 160
_ANSWER = 300


@click.command("evaluate", cls=Command)
@click.argument("model")
@click.option("--data", metavar="SOURCE", help="Rows that were not trained; a run has its own, the rows it held out.")
@click.option("-n", "rows", type=click.IntRange(1), metavar="N", help="Use the first N rows only.")
@click.option("--base-too", is_flag=True, help="Measure what the model started from too.")
@click.option("--against", metavar="MODEL", help="Measure another model too.")
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Cut answers off here; a cut answer is wrong.")
@click.option("--chat-template", metavar="FILE", help="Chat template to ask by, instead of the model's own.")
@click.option(
    "--wrong",
    "shown",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    metavar="N",
    help="Wrong answers to show.",
)
@click.option(
    "--at-least", type=click.FloatRange(0, 1), metavar="SHARE", help="Exit with 1 when the exact match is lower."
)
def command(
    model: str,
    data: str | None,
    rows: int | None,
    base_too: bool,
    against: str | None,
    max_tokens: int | None,
    chat_template: str | None,
    shown: int,
    at_least: float | None,
    as_json: bool,
) -> int:
    """Measure MODEL on held-out rows: exact match of its answers, scores they say, perplexity where rows are text.

    MODEL is a run, an adapter, a model folder, an ft: id, a hub id or `practice`. Each conversation is asked up to its
    last answer and answered greedily, up to the end of the turn. White space at the ends and thoughts do not count.
    """
    from luthier.errors import CallError
    from luthier.workflow import Evaluation, evaluate_models

    if base_too and against:
        raise CallError("--base-too and --against name two other models", hint="keep one of them")
    wanted = Evaluation(data, rows, max_tokens, chat_template)
    with progress_bar("answering", quiet=as_json) as progress:
        found = evaluate_models(model, wanted, base_too=base_too, against=against, progress=progress)
    exact = found[0].exact
    is_low = at_least is not None and (exact is None or exact.share < at_least)
    if as_json:
        print_json({"ok": not is_low, "data": data, "models": [_as_dict(each, shown) for each in found]})
        return int(is_low)
    if _has_references(found[0]):
        _print_exact([(each.model, each.exact) for each in found if each.exact])
    _print_scores([(each.model, each.scores) for each in found if each.scores])
    _print_perplexity([(each.model, each.perplexity) for each in found if each.perplexity])
    _print_notes(found)
    if exact and _has_references(found[0]):
        _print_wrong(exact, shown)
    if is_low:
        warn(f"the exact match is lower than --at-least {at_least:g}")
    return int(is_low)


def _as_dict(found: Evaluated, wrong: int) -> dict[str, Any]:
    return {
        "model": found.model,
        "exact_match": found.exact.as_dict(wrong=wrong) if found.exact else None,
        "scores": found.scores.as_dict() if found.scores else None,
        "perplexity": found.perplexity.as_dict() if found.perplexity else None,
        "left_out": found.left_out,
    }


def _has_references(found: Evaluated) -> bool:
    """Whether the rows say what a right answer is; of pairs judged without scores only the order is known."""
    return found.scores is None or len(found.scores.known) > 0


def _print_exact(found: list[tuple[str, ExactMatch]]) -> None:
    """One line for each model, the one that was asked for last."""
    from luthier.evals.exact_match import count_changes

    if not found:
        return
    head = ("model", "exact match", "", "95 % interval", "tokens/s")
    lines = [
        (
            name,
            f"{exact.right:,} of {exact.rows:,}",
            f"{exact.share:.1%}",
            "{:.1%} to {:.1%}".format(*exact.interval),
            f"{exact.tokens_per_second:,.0f}",
        )
        for name, exact in reversed(found)
    ]
    print_table([head, *lines], right=(1, 2, 4))
    if len(found) > 1:
        gained, lost = count_changes(found[0][1], found[1][1])
        say(f"  {gained:,} rows are right only with {found[0][0]}, {lost:,} only with {found[1][0]}")


def _print_scores(found: list[tuple[str, Scores]]) -> None:
    """How well the scores that the answers say agree with the right ones; a dash where nothing is known of it."""
    if not found:
        return
    head = ("model", "score right", "95 % interval", "error", "Spearman", "better scored higher", "readable")
    lines = []
    for name, scores in reversed(found):
        facts = scores.as_dict()
        of_known = ("-",) * 4
        if "known" in facts:
            interval = "{:.1%} to {:.1%}".format(*facts["interval_95"])
            of_known = (f"{facts['accuracy']:.1%}", interval, f"{facts['error']:.3g}", f"{facts['spearman']:.3f}")
        better = f"{facts['better_higher']:.1%} of {facts['prompts']:,}" if "prompts" in facts else "-"
        lines.append((name, *of_known, better, f"{facts['readable']:.1%}"))
    print_table([head, *lines], right=(1, 3, 4, 5, 6))


def _print_perplexity(found: list[tuple[str, Perplexity]]) -> None:
    if not found:
        return
    head = ("model", "perplexity", "loss", "texts", "tokens")
    lines = [
        (name, f"{each.perplexity:,.3f}", f"{each.loss:.4f}", f"{each.texts:,}", f"{each.tokens:,}")
        for name, each in reversed(found)
    ]
    print_table([head, *lines], right=(1, 2, 3, 4))


def _print_notes(found: list[Evaluated]) -> None:
    from luthier.data.reasons import list_counts

    left_out = found[0].left_out
    if left_out:
        say(f"  note: {sum(left_out.values()):,} rows were left out: {list_counts(left_out)}")
    for each in found:
        if each.exact and each.exact.cut:
            say(f"  note: {each.exact.cut:,} answers of {each.model} were cut off; --max-tokens gives them more room")


def _print_wrong(found: ExactMatch, count: int) -> None:
    wrong = found.wrong
    for answer in wrong[:count]:
        say()
        say("wrong at {}:{}".format(*answer.place))
        for name, text in _parts(answer):
            say(f"  {name:<8}  {text}")
    if len(wrong) > count > 0:
        say(f"and {len(wrong) - count:,} more")


def _parts(answer: Answer) -> list[tuple[str, str]]:
    asked = answer.question
    tail = asked.prompt[-_TAIL:]
    return [
        ("asked", ("..." if len(tail) < len(asked.prompt) else "") + _one_line(tail)),
        ("expected", _short(asked.answer)),
        ("got", _short(answer.got) or "nothing"),
    ]


def _short(text: str) -> str:
    line = _one_line(text.strip())
    return line if len(line) <= _ANSWER else line[:_ANSWER] + "..."


def _one_line(text: str) -> str:
    """Line breaks made visible; nothing of a model's answer may move the cursor of a terminal."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
