"""Print what preparation found: counts by place and reason, lengths, notes."""

from __future__ import annotations

from typing import Any

from luthier.cli.output import paint, print_table, say
from luthier.data.notes import NOTES
from luthier.data.reasons import REASONS, list_counts

_BAR = 40


def print_data_report(summary: dict[str, Any]) -> None:
    """Everything a person should know of their data before training, most important first."""
    say(f"{summary['rows']:,} rows read from {_named(summary['files'])} ({_listed(summary['formats'])})")
    _print_places(summary)
    if "lengths" in summary:
        _print_tokens(summary)
    _print_notes(summary)


def _named(files: list[str]) -> str:
    return files[0] if len(files) == 1 else f"{len(files)} files"


def _listed(counts: dict[str, int]) -> str:
    return list_counts(dict(sorted(counts.items(), key=lambda item: -item[1]))) or "no format"


def _print_places(summary: dict[str, Any]) -> None:
    rows = [(name, f"{summary[name]:,}", "") for name in ("train", "valid", "dropped")]
    rows += [(f"  {name}", f"{count:,}", REASONS[name].sentence) for name, count in summary["reasons"].items()]
    print_table(rows, right=(1,))
    total = " + ".join(f"{summary[name]:,}" for name in ("train", "valid", "dropped"))
    say(f"  {paint('ledger', '32')}  {total} = {summary['rows']:,}: every row is in one place")
    if summary["reasons"].get("too_long") and "text" in summary["formats"]:
        say('  hint: data.too_long = "split" cuts long plain texts into pieces instead')


def _print_tokens(summary: dict[str, Any]) -> None:
    tokens, trained, lengths = summary["tokens"], summary["trained_tokens"], summary["lengths"]
    usable = tokens["train"] + tokens["valid"]
    share = (trained["train"] + trained["valid"]) / usable if usable else 0.0
    say()
    examples = summary["examples"]["train"] + summary["examples"]["valid"]
    rows = summary["train"] + summary["valid"]
    named = f" in {examples:,} examples" if examples != rows else ""
    say(f"{usable:,} tokens{named}, {share:.1%} of them trained ({summary['tokenizer']})")
    if not lengths:
        return
    say(
        "  length in tokens: "
        + "  ".join(f"{name} {lengths[name]:,}" for name in ("min", "median", "p90", "p99", "max"))
    )
    most = max(count for _, count in lengths["histogram"])
    rows = [(f"<= {edge:,}", f"{count:,}", "#" * round(_BAR * count / most)) for edge, count in lengths["histogram"]]
    print_table(rows, right=(0, 1))


def _print_notes(summary: dict[str, Any]) -> None:
    for name, count in summary["notes"].items():
        say(f"  note: {count:,} rows: {NOTES[name]}")
    if summary["leakage"]:
        more = ", ..." if summary["leakage"] > len(summary["leaking_rows"]) else ""
        say(f"  leakage: {summary['leakage']:,} held-out rows have a prompt that is trained too: ", end="")
        say(", ".join(summary["leaking_rows"]) + more)
    if summary.get("fast_tokenizer_differed"):
        say("  note: the fast tokenizer gave other tokens for some row, so the model's own did all the work")
