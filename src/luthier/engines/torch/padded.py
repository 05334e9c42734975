"""Streams side by side with padding on the left, through transformers' own attention and cache.

For accelerators, and for models that keep another state than ours knows of; one of those gets one stream in a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from luthier.engines.torch.lanes import find_own_head
from luthier.engines.torch.loading import Loaded, own_attention, run_base
from luthier.engines.torch.shared import Pass, SharedLayers, Stretch
from luthier.engines.torch.stream import Group, Stream
from luthier.engines.verbs import Drawn, batch_of

_PREFILL_TOKENS = 8192
_ATTENTION = {"full_attention", "sliding_attention"}


@dataclass
class _One:
    """A stream and the prompt it goes on from."""

    stream: Stream
    group: Group

    @property
    def prompt(self) -> list[int]:
        return self.group.prompt


@dataclass
class _Batch:
    """Streams that go on together: their state in the model, and which of its places each of them sees."""

    streams: list[_One]
    cache: Any
    seen: Tensor

    @property
    def can_join(self) -> bool:
        """Whether the state is keys and values alone, which can lie side by side."""
        return all(type(layer).__name__ == "DynamicLayer" for layer in getattr(self.cache, "layers", [None]))


class PaddedStreams:
    """All streams of a model, one more token of each in a step."""

    def __init__(self, loaded: Loaded, shared: SharedLayers) -> None:
        self._loaded, self._shared, self._model = loaded, shared, loaded.model
        self._waiting: list[_One] = []
        self._batches: list[_Batch] = []
        kinds = getattr(self._model.config.get_text_config(), "layer_types", None) or ()
        # A state that goes from token to token takes in the padding.
        self._can_pad = not getattr(self._model, "_is_stateful", False) and _ATTENTION.issuperset(kinds)
        self._takes_positions = "position_ids" in inspect.signature(self._model.forward).parameters

    def add(self, group: Group) -> None:
        """A prompt and its streams."""
        if group.rated is not None:
            self._rate_prompt(group)
        self._waiting += [_One(stream, group) for stream in group.streams]

    def leave(self, stream: int) -> None:
        """No more tokens of a stream."""
        self._waiting = [each for each in self._waiting if each.stream.id != stream]
        for batch in self._batches:
            stay = [row for row, each in enumerate(batch.streams) if each.stream.id != stream]
            if len(stay) < len(batch.streams):
                _keep_rows(batch, stay)
        self._batches = [batch for batch in self._batches if batch.streams]

    def step(self) -> list[Drawn]:
        """One more token of every stream."""
        drawn: list[Drawn] = []
        try:
            with own_attention(self._model):
                for batch in self._batches:
                    tokens = torch.tensor([[one.stream.last] for one in batch.streams], device=self._model.device)
                    logits = self._advance(batch, tokens, torch.ones_like(tokens))
                    drawn += [one.stream.draw(own) for one, own in zip(batch.streams, logits, strict=True)]
                for group in self._take_waiting():
                    batch, logits = self._begin(group)
                    drawn += [
                        one.stream.draw(own, one.group.rating(logits.shape[-1]))
                        for one, own in zip(group, logits, strict=True)
                    ]
                    self._add(batch)
        finally:
            self._shared.now = Pass()
        return drawn

    def _rate_prompt(self, group: Group) -> None:
        """In a pass of its own."""
        batch = batch_of([group.prompt], None)
        stretches = [] if group.adapter is None else [Stretch(group.adapter, 0, len(group.prompt))]
        self._shared.now = Pass(stretches, len(group.prompt))
        try:
            hidden = run_base(self._loaded, batch)
        finally:
            self._shared.now = Pass()
        group.rate(find_own_head(self._loaded.head, self._shared, group.adapter), hidden, 0)

    def _advance(self, batch: _Batch, tokens: Tensor, fresh: Tensor) -> Tensor:
        """Tokens go in where `fresh` says that they are no padding, and the logits of what follows come out."""
        self._shared.now = Pass(_stretches(batch.streams), len(batch.streams))
        batch.seen = torch.cat([batch.seen, fresh], 1)
        places: dict[str, Tensor] = {}
        if self._takes_positions:
            places["position_ids"] = (batch.seen.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = self._model(
            input_ids=tokens,
            attention_mask=batch.seen,
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=1,
            **places,
        )
        batch.cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits

    def _take_waiting(self) -> Iterator[list[_One]]:
        """New streams, in groups whose prompts go through the model together."""
        self._waiting.sort(key=lambda one: -len(one.prompt))
        while self._waiting:
            width = len(self._waiting[0].prompt)
            count = max(1, _PREFILL_TOKENS // width) if self._can_pad else 1
            group, self._waiting = self._waiting[:count], self._waiting[count:]
            yield group

    def _begin(self, group: list[_One]) -> tuple[_Batch, Tensor]:
        from transformers import DynamicCache

        width = max(len(one.prompt) for one in group)
        rows = [[0] * (width - len(one.prompt)) + one.prompt for one in group]
        real = [[0] * (width - len(one.prompt)) + [1] * len(one.prompt) for one in group]
        device = self._model.device
        cache = DynamicCache() if self._can_pad else None
        batch = _Batch(group, cache, torch.zeros(len(group), 0, device=device).long())
        return batch, self._advance(batch, torch.tensor(rows, device=device), torch.tensor(real, device=device))

    def _add(self, batch: _Batch) -> None:
        """Lay a new batch beside the one that runs, where their states allow it."""
        other = next((each for each in self._batches if each.can_join), None) if batch.can_join else None
        if other is None:
            self._batches.append(batch)
            return
        width = max(other.seen.shape[1], batch.seen.shape[1])
        for ours, theirs in zip(other.cache.layers, batch.cache.layers, strict=True):
            ours.keys = torch.cat([_widen(ours.keys, width, -2), _widen(theirs.keys, width, -2)])
            ours.values = torch.cat([_widen(ours.values, width, -2), _widen(theirs.values, width, -2)])
        other.seen = torch.cat([_widen(other.seen, width, -1), _widen(batch.seen, width, -1)])
        other.streams += batch.streams


def _stretches(streams: Sequence[_One]) -> list[Stretch]:
    """Rows of one adapter that lie together."""
    found, start = [], 0
    for adapter, rows in groupby(streams, key=lambda one: one.group.adapter):
        stop = start + len(list(rows))
        if adapter is not None:
            found.append(Stretch(adapter, start, stop))
        start = stop
    return found


def _widen(values: Tensor, width: int, axis: int) -> Tensor:
    """Padding on the left, up to a width."""
    missing = width - values.shape[axis]
    return F.pad(values, (missing, 0) if axis == -1 else (0, 0, missing, 0)) if missing else values


def _keep_rows(batch: _Batch, rows: list[int]) -> None:
    """The batch without the streams that left, and without the padding that only they needed."""
    batch.streams = [batch.streams[row] for row in rows]
    if not rows:
        return
    batch.seen = batch.seen[rows]
    padding = int((batch.seen.cumsum(1) == 0).sum(1).min())
    batch.seen = batch.seen[:, padding:]
    for layer in batch.cache.layers if batch.can_join else ():
        layer.keys = layer.keys[rows][..., padding:, :]
        layer.values = layer.values[rows][..., padding:, :]
