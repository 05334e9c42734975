"""The comparison of two models in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def describe(metrics: Mapping[str, Mapping[str, Any]], base: str, count: str) -> str:
    """What changed for the better and for the worse, with its numbers; or, in words, that nothing can be told."""
    said = {
        word: [_numbers(name, entry) for name, entry in metrics.items() if entry["verdict"] == word]
        for word in ("better", "worse")
    }
    if not metrics:
        return f"The answers to {count} stand side by side; without references there is nothing to score them by."
    if not (said["better"] or said["worse"]):
        return f"No detectable difference between the tuned model and {base} on {count}."
    parts = [f"{word} than {base} on {_listed(named)}" for word, named in said.items() if named]
    return f"The tuned model is {', but '.join(parts)}."


def _numbers(name: str, entry: Mapping[str, Any]) -> str:
    low, high = (f"{entry[key]:+.3g}" for key in ("low", "high"))
    return f"{name} ({entry['base']:.3g} to {entry['tuned']:.3g}, difference {low} to {high})"


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
