"""The part of a model behind its decoder: log-probabilities of the targets alone, in chunks, never of everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

_CHUNK_ELEMENTS = 1 << 25
Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class Parts:
    """A model as a decoder that gives hidden states, and a head that makes logits of them.

    Where a model's code cannot be parted so, `head` is None and `decoder` gives logits.
    """

    model: Any
    decoder: Callable[[mx.array], mx.array]
    head: Callable[[mx.array], mx.array] | None

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits in fp32 of a list of hidden states, or of several; where the decoder gives logits, the same."""
        if self.head is None:
            return hidden.astype(mx.float32)
        found = self.head(hidden if hidden.ndim == 3 else hidden[None]).astype(mx.float32)
        return found if hidden.ndim == 3 else found[0]


class _Passing:
    """Stands in for a model whose decoder has done its work: its own code then runs the head alone."""

    def __init__(self, owner: Any, name: str) -> None:
        object.__setattr__(self, "_owner", owner)
        object.__setattr__(self, "_name", name)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._owner, name)
        return _Done(found) if name == self._name else found


class _Done:
    """A decoder that gives back what it is given, and has what the real one has."""

    def __init__(self, real: Any) -> None:
        object.__setattr__(self, "_real", real)

    def __call__(self, hidden: mx.array, *_: Any, **__: Any) -> mx.array:
        return hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def part_model(model: Any) -> Parts:
    """The decoder and the head of a model, where running them one after the other gives the model's own logits."""
    owner, name = _find_decoder(model)
    whole = Parts(model, lambda tokens: model(tokens), None)
    if name is None:
        return whole
    parted = Parts(
        model,
        lambda tokens: getattr(owner, name)(tokens),
        lambda hidden: type(owner).__call__(_Passing(owner, name), hidden),
    )
    tokens = mx.array([[1, 2, 3, 1]])
    try:
        found = parted.logits(parted.decoder(tokens)[:, 1:])
    except (TypeError, ValueError, AttributeError):
        return whole
    expected = whole.logits(model(tokens))[:, 1:]
    if found.shape != expected.shape:
        return whole
    largest = mx.maximum(mx.abs(expected).max(), 1.0)
    return parted if mx.abs(found - expected).max().item() <= 2e-2 * largest.item() else whole


def _find_decoder(model: Any) -> tuple[Any, str | None]:
    """The module whose child holds the layers, and that child's name."""
    layers = getattr(model, "layers", None)
    if not isinstance(layers, list) or not layers:
        return model, None
    paths = [path for path, module in model.named_modules() if module is layers[0]]
    # `model.layers.0`: the decoder is `model`, within the module that also has the head.
    parents = paths[0].split(".")[:-2] if paths else []
    if not parents:
        return model, None
    owner = model
    for name in parents[:-1]:
        owner = getattr(owner, name)
    return owner, parents[-1]


def chunks(count: int, width: int) -> Iterator[slice]:
    """Rows whose logits may be held at once."""
    size = max(64, _CHUNK_ELEMENTS // max(1, width))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def rate(logits: mx.array, targets: mx.array) -> mx.array:
    """Log-probabilities of the targets in fp32; K of them a place where targets have two dimensions."""
    chosen = targets if targets.ndim == 2 else targets[:, None]
    found = mx.take_along_axis(logits, chosen, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)
    return found if targets.ndim == 2 else found[:, 0]


def rate_again(parts: Parts, hidden: mx.array, targets: mx.array, outer: Arrays, width: int) -> mx.array:
    """The same of hidden states inside a gradient: where there are many, logits are computed again in the backward pass
    and not kept. `outer` are the trained weights that the head may use, for a gradient to reach them.
    """
    pieces = list(chunks(targets.shape[0], width))
    if len(pieces) <= 1:
        return rate(parts.logits(hidden), targets)

    def piece(outer: Arrays, hidden: mx.array, targets: mx.array) -> mx.array:
        place(parts.model, outer)
        return rate(parts.logits(hidden), mx.stop_gradient(targets))

    work = mx.checkpoint(piece)
    found = [work(outer, hidden[rows], targets[rows]) for rows in pieces]
    place(parts.model, outer)
    return mx.concatenate(found)


def place(model: nn.Module, arrays: Arrays) -> None:
    """Put arrays into the model by path."""
    if arrays:
        model.update(tree_unflatten(list(arrays.items())))
