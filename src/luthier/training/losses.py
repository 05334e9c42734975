"""Losses as functions of the log-probabilities of the trained tokens: each gives its value and its slope, in numpy.

Values are sums over the loss's own unit (trained tokens, or pairs); the loop divides value and slope by the number of
units in the whole step, so that no loss knows how a step was cut into micro-batches. The slope is the derivative of
the value by each log-probability, which is all that an engine needs to send gradients back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from luthier.engines.verbs import LossResult

Floats = npt.NDArray[np.float64]
Offsets = npt.NDArray[np.int64]


def cross_entropy(logprobs: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> LossResult:
    """Weighted negative log-likelihood. Two-dimensional log-probabilities are those of K soft targets a token."""
    p = np.asarray(logprobs, np.float64)
    w = np.ones_like(p) if weights is None else np.broadcast_to(np.asarray(weights, np.float64), p.shape)
    return LossResult(float(-(w * p).sum()), -w)


def importance_sampling(logprobs: npt.ArrayLike, sampled: npt.ArrayLike, advantages: npt.ArrayLike) -> LossResult:
    """Policy gradient with the ratio to the policy that sampled: the sum of -ratio * advantage."""
    p, q, a = _floats(logprobs, sampled, advantages)
    ratio = np.exp(p - q)
    return LossResult(float(-(ratio * a).sum()), -ratio * a)


def ppo(
    logprobs: npt.ArrayLike, sampled: npt.ArrayLike, advantages: npt.ArrayLike, *, low: float = 0.8, high: float = 1.2
) -> LossResult:
    """The same, but a ratio outside `low` to `high` earns nothing more; the bounds are ratios."""
    p, q, a = _floats(logprobs, sampled, advantages)
    ratio = np.exp(p - q)
    clipped = np.clip(ratio, low, high)
    is_free = ratio * a <= clipped * a
    return LossResult(
        float(-np.minimum(ratio * a, clipped * a).sum()),
        np.where(is_free, -ratio * a, 0.0),
        {"clipped_tokens": float((~is_free).sum())},
    )


def cispo(
    logprobs: npt.ArrayLike, sampled: npt.ArrayLike, advantages: npt.ArrayLike, *, low: float = 0.8, high: float = 1.2
) -> LossResult:
    """A clipped ratio as a constant weight of the log-probability, so that every token keeps a gradient."""
    p, q, a = _floats(logprobs, sampled, advantages)
    weight = np.clip(np.exp(p - q), low, high) * a
    return LossResult(float(-(weight * p).sum()), -weight)


def dro(logprobs: npt.ArrayLike, sampled: npt.ArrayLike, advantages: npt.ArrayLike, *, beta: float) -> LossResult:
    """Reward with a quadratic pull towards the policy that sampled."""
    p, q, a = _floats(logprobs, sampled, advantages)
    away = p - q
    return LossResult(float(-(p * a - 0.5 * beta * away**2).sum()), -(a - beta * away))


def dpo(
    logprobs: npt.ArrayLike,
    offsets: Offsets,
    reference: npt.ArrayLike,
    *,
    beta: float = 0.1,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
    length_normalised: bool = False,
) -> LossResult:
    """Direct preference optimisation over pairs: sequences 2k and 2k + 1 are chosen and rejected.

    `reference` holds the reference model's log-probabilities of the same tokens. IPO compares means a token, as its
    authors' correction has it; `length_normalised` does so for the sigmoid too.
    """
    p, r = _floats(logprobs, reference)
    pairs = _Pairs(p, offsets, by_length=length_normalised or loss == "ipo")
    policy, base = pairs.scores(p), pairs.scores(r)
    margin = (policy[0] - base[0]) - (policy[1] - base[1])
    if loss == "ipo":
        away = margin - 1 / (2 * beta)
        value, slope = away**2, 2 * away
    else:
        h = beta * margin
        value = (1 - label_smoothing) * _softplus(-h) + label_smoothing * _softplus(h)
        slope = beta * (-(1 - label_smoothing) * _sigmoid(-h) + label_smoothing * _sigmoid(h))
    rewards = beta * (policy[0] - base[0]), beta * (policy[1] - base[1])
    return LossResult(float(value.sum()), pairs.spread(slope, -slope), _reward_metrics(*rewards))


def simpo(logprobs: npt.ArrayLike, offsets: Offsets, *, beta: float = 2.0, gamma: float = 1.0) -> LossResult:
    """Preference without a reference: mean log-probabilities, and a margin `gamma` to win by."""
    (p,) = _floats(logprobs)
    pairs = _Pairs(p, offsets, by_length=True)
    chosen, rejected = pairs.scores(p)
    h = beta * (chosen - rejected) - gamma
    slope = -beta * _sigmoid(-h)
    return LossResult(
        float(_softplus(-h).sum()), pairs.spread(slope, -slope), _reward_metrics(beta * chosen, beta * rejected)
    )


def orpo(logprobs: npt.ArrayLike, offsets: Offsets, *, beta: float = 0.1) -> LossResult:
    """Imitation of the chosen answer, plus `beta` times the log odds ratio of chosen to rejected, per pair."""
    (p,) = _floats(logprobs)
    pairs = _Pairs(p, offsets, by_length=True)
    chosen, rejected = pairs.scores(p)
    odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    pull = -beta * _sigmoid(-odds)
    # d/dp [p - log(1 - e^p)] = 1 / (1 - e^p)
    slope_chosen = -1 + pull / -np.expm1(chosen)
    slope_rejected = -pull / -np.expm1(rejected)
    value = -chosen + beta * _softplus(-odds)
    return LossResult(
        float(value.sum()), pairs.spread(slope_chosen, slope_rejected), _reward_metrics(beta * chosen, beta * rejected)
    )


LOSSES: dict[str, Callable[..., LossResult]] = {
    loss.__name__: loss for loss in (cross_entropy, importance_sampling, ppo, cispo, dro, dpo, simpo, orpo)
}
# Their slope is known before the log-probabilities are, so that an engine can do it all in one pass.
CONSTANT_SLOPE = frozenset({"cross_entropy"})


class _Pairs:
    """Sums (or means) over neighbouring stretches of tokens, and the way back."""

    def __init__(self, logprobs: Floats, offsets: Offsets, *, by_length: bool) -> None:
        self._offsets = np.asarray(offsets, np.int64)
        self._counts = np.diff(self._offsets)
        if len(self._counts) % 2 or self._offsets[-1] != len(logprobs) or (self._counts < 1).any():
            raise ValueError(f"pairs need an even number of non-empty sequences that cover {len(logprobs)} tokens")
        self._scale = 1.0 / self._counts if by_length else np.ones(len(self._counts))

    def scores(self, values: Floats) -> tuple[Floats, Floats]:
        """Chosen and rejected scores of each pair."""
        totals = np.add.reduceat(values, self._offsets[:-1]) * self._scale
        return totals[::2], totals[1::2]

    def spread(self, chosen: Floats, rejected: Floats) -> Floats:
        """Slopes by score, given back to the tokens that made the scores."""
        by_sequence = np.empty(len(self._counts))
        by_sequence[::2], by_sequence[1::2] = chosen, rejected
        return np.repeat(by_sequence * self._scale, self._counts)


def _floats(*arrays: npt.ArrayLike) -> list[Floats]:
    found = [np.asarray(array, np.float64) for array in arrays]
    if any(array.shape != found[0].shape for array in found):
        raise ValueError(f"arrays of one loss must have one shape, found {[array.shape for array in found]}")
    return found


def _softplus(x: Floats) -> Floats:
    return np.logaddexp(0.0, x)


def _sigmoid(x: Floats) -> Any:
    return np.exp(-np.logaddexp(0.0, -x))


def _log1mexp(x: Floats) -> Floats:
    """log(1 - e^x) for x < 0, exact on both sides of -log 2."""
    return np.where(x > -np.log(2), np.log(-np.expm1(x)), np.log1p(-np.exp(x)))


def _reward_metrics(chosen: Floats, rejected: Floats) -> dict[str, float]:
    return {
        "reward_chosen": float(chosen.sum()),
        "reward_rejected": float(rejected.sum()),
        "reward_margin": float((chosen - rejected).sum()),
        "reward_accuracy": float((chosen > rejected).sum()),
    }
