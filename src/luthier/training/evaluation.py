"""Measure the held-out part: loss, perplexity and token accuracy, and rewards for preferences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from luthier.data.pack import lay_out_step
from luthier.data.prepared import Prepared
from luthier.engines.verbs import Engine
from luthier.spec.objective import Objective
from luthier.training.batches import Item, build_batch, read_item
from luthier.training.objectives import References, build_loss, is_paired
from luthier.training.signals import StopFlag

_WINDOW = 256
_SUMS = ("value", "units", "nll", "hits", "tokens")


@dataclass(frozen=True)
class Scores:
    """What the held-out part says of the weights."""

    loss: float
    perplexity: float
    token_accuracy: float
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)

    def by_name(self, metric: str) -> float:
        """A metric so that smaller is better."""
        value = float(getattr(self, metric))
        return -value if metric == "token_accuracy" else value


def evaluate(
    engine: Engine,
    prepared: Prepared,
    objective: Objective,
    *,
    references: References | None,
    budget_tokens: int,
    share: tuple[int, int],
    stop: StopFlag,
) -> Scores | None:
    """The scores of the held-out examples; None when asked to stop on the way."""
    sums: dict[str, float] = dict.fromkeys(_SUMS, 0.0)
    for group in _groups(prepared, budget_tokens, share):
        if stop:
            break
        _add(sums, engine, group, objective, references)
    names = sorted(sums) if not is_paired(objective) else sorted({*sums, *_REWARDS})
    totals = engine.sum_over_processes(np.array([float(bool(stop)), *(sums.get(name, 0.0) for name in names)]))
    if totals[0]:
        return None
    return _scores(dict(zip(names, totals[1:].tolist(), strict=True)))


_REWARDS = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")


def _groups(prepared: Prepared, budget_tokens: int, share: tuple[int, int]) -> Iterable[list[Item]]:
    """The held-out examples in micro-batches, those of one process."""
    rank, count = share
    examples = prepared.valid.tolist()
    number = 0
    for start in range(0, len(examples), _WINDOW):
        items = [read_item(prepared, int(example)) for example in examples[start : start + _WINDOW]]
        for group in lay_out_step([item.tokens for item in items], budget_tokens):
            if number % count == rank:
                yield [items[place] for place in group]
            number += 1


def _add(
    sums: dict[str, float],
    engine: Engine,
    items: Sequence[Item],
    objective: Objective,
    references: References | None,
) -> None:
    batch = build_batch(items)
    found = engine.forward(batch).result()
    result = build_loss(objective, items, batch, scale=1.0, references=references).compute(found.logprobs)
    is_imitated = np.ones(len(found.logprobs), bool)
    if is_paired(objective):
        # Perplexity and accuracy are those of the chosen answers.
        is_imitated = np.repeat(np.arange(len(batch.offsets) - 1) % 2 == 0, np.diff(batch.offsets))
    sums["value"] += result.value
    sums["units"] += len(items) if is_paired(objective) else len(found.logprobs)
    sums["nll"] -= float(found.logprobs[is_imitated].sum())
    sums["tokens"] += int(is_imitated.sum())
    sums["hits"] += float(found.hits[is_imitated].sum()) if found.hits is not None else math.nan
    for name, value in result.metrics.items():
        sums[name] = sums.get(name, 0.0) + value


def _scores(sums: dict[str, float]) -> Scores:
    value, units, nll, hits, tokens = (sums.pop(name) for name in _SUMS)
    mean = nll / tokens
    return Scores(
        loss=value / units,
        perplexity=math.exp(min(mean, 700.0)),
        token_accuracy=hits / tokens,
        tokens=int(tokens),
        metrics={name: total / units for name, total in sums.items()},
    )
