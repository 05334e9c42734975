"""The losses that Tinker clients name, over the log-probabilities of all places of one request, summed.

Formulas that were never published (`gspo`, `stable_reinforce`, compiled `custom` ones) are refused: a guess would
train something else than the client believes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from luthier.engines.verbs import Batch, Floats, Loss, LossResult
from luthier.host.datums import Datum, LossRequest, clip_bounds
from luthier.host.tensors import Array
from luthier.training import losses


def build_loss(request: LossRequest) -> Loss:
    """The loss of a checked request; what it computes takes the log-probabilities in the layout of its batch.

    Its metrics carry their reduction in their names. A cross-entropy tells its slope beforehand.
    """
    if request.loss == "cross_entropy":
        weights = _laid_out(request.data, _weights)
        return Loss(lambda p: _weighted(p, weights), weights=weights)
    sampled = _laid_out(request.data, lambda datum: datum.inputs["logprobs"])
    advantages = _laid_out(request.data, lambda datum: datum.inputs["advantages"])
    counted = float(((sampled != 0) | (advantages != 0)).sum())
    return Loss(lambda p: _policy(request, p, sampled, advantages, counted))


def batch_of_datums(data: Sequence[Datum]) -> Batch:
    """The data packed: every token is a source, and what follows it is in `target_tokens`.

    Where one datum has K targets a place, all have as many; those that are filled in weigh nothing.
    """
    lengths = [len(datum.tokens) for datum in data]
    ends = np.cumsum([0, *lengths])
    segments = np.stack([ends[:-1], ends[1:]], 1)
    return Batch(
        np.concatenate([datum.tokens for datum in data]),
        segments,
        np.zeros_like(segments),
        np.arange(ends[-1], dtype=np.int64),
        _laid_out(data, lambda datum: datum.inputs["target_tokens"], np.int64),
        ends,
        np.zeros(len(data), np.int64),
    )


def outputs_of(data: Sequence[Datum], logprobs: Array) -> tuple[Mapping[str, Array], ...]:
    """What each datum is told: its own log-probabilities, in the shape of its targets, as float32."""
    ends = np.cumsum([0, *(len(datum.tokens) for datum in data)])
    told = []
    for datum, start, stop in zip(data, ends[:-1], ends[1:], strict=True):
        shape = datum.inputs["target_tokens"].shape
        own = logprobs[start:stop]
        if own.ndim == 2:
            own = own[:, 0] if len(shape) == 1 else own[:, : shape[1]]
        told.append({"logprobs": np.ascontiguousarray(own, np.float32)})
    return tuple(told)


def _laid_out(
    data: Sequence[Datum], pick: Callable[[Datum], Array], dtype: type[np.float64] | type[np.int64] = np.float64
) -> Array:
    """One array of every datum, one after another; as wide as the widest where any has K targets a place."""
    found = [pick(datum) for datum in data]
    width = max((array.shape[1] for array in found if array.ndim == 2), default=0)
    if not width:
        return np.concatenate(found).astype(dtype)
    wide = np.zeros((sum(len(array) for array in found), width), dtype)
    start = 0
    for array in found:
        columns = array if array.ndim == 2 else array[:, None]
        wide[start : start + len(array), : columns.shape[1]] = columns
        start += len(array)
    return wide


def _weights(datum: Datum) -> Array:
    return datum.inputs.get("weights", np.ones(datum.inputs["target_tokens"].shape))


def _weighted(logprobs: Floats, weights: Floats) -> LossResult:
    found = losses.cross_entropy(logprobs, weights)
    return _reported(found, tokens=float((weights != 0).any(-1).sum() if weights.ndim == 2 else (weights != 0).sum()))


def _policy(request: LossRequest, logprobs: Floats, sampled: Floats, advantages: Floats, counted: float) -> LossResult:
    low, high = clip_bounds(request.config)
    # A ratio that overflows is told by a value that is not finite; the warning would tell nobody.
    with np.errstate(over="ignore", invalid="ignore"):
        if request.loss == "importance_sampling":
            return _reported(losses.importance_sampling(logprobs, sampled, advantages), tokens=counted)
        if request.loss == "dro":
            beta = float(request.config["beta"])
            return _reported(losses.dro(logprobs, sampled, advantages, beta=beta), tokens=counted)
        if request.loss == "ppo":
            found = losses.ppo(logprobs, sampled, advantages, low=low, high=high)
            return _reported(found, tokens=counted, clipped_tokens=found.metrics["clipped_tokens"])
        found = losses.cispo(logprobs, sampled, advantages, low=low, high=high)
        ratio = np.exp(np.asarray(logprobs, np.float64) - sampled)
        is_clipped = ((ratio < low) | (ratio > high)) & (advantages != 0)
        return _reported(found, tokens=counted, clipped_tokens=float(is_clipped.sum()))


def _reported(found: LossResult, **sums: float) -> LossResult:
    metrics = {"loss:sum": found.value, **{f"{name}:sum": value for name, value in sums.items()}}
    return LossResult(found.value, found.slope, metrics)
