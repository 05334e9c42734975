"""Measure the held-out part: loss, perplexity and token accuracy, and rewards for preferences."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from luthier.data.prepared import Prepared
from luthier.engines.verbs import Trainee
from luthier.spec.objective import Objective
from luthier.training.objectives import References, build_loss, is_paired, metric_names
from luthier.training.passes import Pass, Passed

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

    def as_dict(self) -> dict[str, Any]:
        """For JSON, in which a number that is not finite has no place."""
        said = asdict(self)
        metrics = said.pop("metrics")
        return {name: _finite(value) for name, value in said.items()} | {
            "metrics": {name: _finite(value) for name, value in metrics.items()}
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def evaluate(
    engine: Trainee, prepared: Prepared, objective: Objective, references: References | None, way: Pass
) -> Scores | None:
    """The scores of the held-out examples; None when asked to stop on the way."""
    names = (*_SUMS, *metric_names(objective))
    sums = dict.fromkeys(names, 0.0)
    for passed in way.over(engine, prepared, prepared.valid):
        _add(sums, passed, objective, references)
    totals = engine.sum_over_processes(np.array([float(bool(way.stop)), *(sums[name] for name in names)]))
    if totals[0]:
        return None
    return _scores(dict(zip(names, totals[1:].tolist(), strict=True)))


def _add(sums: dict[str, float], passed: Passed, objective: Objective, references: References | None) -> None:
    items, batch, found = passed.items, passed.batch, passed.computed
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
        sums[name] += value


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
