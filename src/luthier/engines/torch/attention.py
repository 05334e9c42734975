"""Packed attention: causal within each segment of a batch, with no padding, registered with transformers by name.

A segment that goes on from a prefix sees the prefix and itself. Sliding windows and soft-capping come as arguments
from the model and are honoured; anything else that would change the result is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from luthier.engines.verbs import Batch
from luthier.errors import UnsupportedError

NAME = "luthier_packed"
LAYOUT = "luthier_layout"
_LANE_STEP = 64


@dataclass(frozen=True)
class Layout:
    """Where the segments of a batch lie, as attention needs it."""

    lengths: tuple[int, ...]
    prefixes: tuple[tuple[int, int] | None, ...]
    device: torch.device

    @cached_property
    def query_starts(self) -> Tensor:
        """Cumulative lengths of the queries."""
        return self._cumulative(self.lengths)

    @cached_property
    def key_lengths(self) -> tuple[int, ...]:
        """What each segment sees at its end: its prefix and itself."""
        return tuple(
            length + (prefix[1] - prefix[0] if prefix else 0)
            for length, prefix in zip(self.lengths, self.prefixes, strict=True)
        )

    @cached_property
    def key_starts(self) -> Tensor:
        """Cumulative lengths of the keys."""
        return self._cumulative(self.key_lengths)

    @cached_property
    def key_places(self) -> Tensor | None:
        """Which token each key is, where prefixes make some appear twice."""
        if not any(self.prefixes):
            return None
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        parts = []
        for start, stop, prefix in zip(starts[:-1], starts[1:], self.prefixes, strict=True):
            if prefix:
                parts.append(np.arange(*prefix))
            parts.append(np.arange(start, stop))
        return torch.from_numpy(np.concatenate(parts)).to(self.device)

    def _cumulative(self, lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=self.device)


class Lane:
    """The keys and values of one stream, layer by layer; there is room for some more than it has."""

    def __init__(self) -> None:
        self.length = 0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, module: torch.nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of new tokens, (1, heads, tokens, width); returns all of the layer's."""
        end = self.length + key.shape[2]
        keys, values = self._kept.get(id(module), (key, value))
        if self.length == 0 or keys.shape[2] < end:
            keys, values = (_with_room(each, self.length, end) for each in (keys, values))
            self._kept[id(module)] = keys, values
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def copy(self) -> Lane:
        """The same for another stream that goes on from here."""
        other = Lane()
        other.length = self.length
        other._kept = {module: (keys.clone(), values.clone()) for module, (keys, values) in self._kept.items()}
        return other


def _with_room(kept: Tensor, length: int, end: int) -> Tensor:
    wider = kept.new_empty(kept.shape[0], kept.shape[1], -(-(end + end // 4) // _LANE_STEP) * _LANE_STEP, kept.shape[3])
    wider[:, :, :length] = kept[:, :, :length]
    return wider


@dataclass(frozen=True)
class Lanes:
    """Streams that take some more tokens: each sees what its lane holds and its own. The last may be of nothing."""

    lengths: tuple[int, ...]
    lanes: tuple[Lane | None, ...]

    def attend(
        self,
        module: torch.nn.Module,
        states: tuple[Tensor, Tensor, Tensor],
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """One layer for all of them, one after another: what a stream sees does not depend on the others."""
        parts = zip(*(state.split(self.lengths, dim=2) for state in states), self.lanes, strict=True)
        outputs = []
        for query, key, value, lane in parts:
            if lane is None:
                outputs.append(torch.zeros_like(query))
                continue
            keys, values = lane.add(module, key, value)
            if query.shape[2] == 1 and softcap is None:
                outputs.append(_attend_last(query, keys, values, scaling, window))
            else:
                outputs.append(_attend(query, keys, values, scaling, window, softcap))
        return torch.cat([each.transpose(1, 2) for each in outputs], dim=1)


def lay_out(batch: Batch, device: torch.device) -> Layout:
    """The layout of a batch."""
    lengths = (batch.segments[:, 1] - batch.segments[:, 0]).tolist()
    prefixes = [(first, last) if last > first else None for first, last in batch.prefixes.tolist()]
    return Layout(tuple(lengths), tuple(prefixes), device)


def register(attend: Callable[..., tuple[Tensor, None]] | None = None) -> None:
    """Make the attention known to transformers, or another one under its name; saying it twice does nothing more."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attend or packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over tensors of shape (1, heads, tokens, width), as transformers calls it."""
    for name in ("s_aux", "position_bias"):
        if others.get(name) is not None:
            raise UnsupportedError(f"this model's attention needs `{name}`, which packed attention does not have")
    layout = others.get(LAYOUT) or Layout((query.shape[2],), (None,), query.device)
    if isinstance(layout, Lanes):
        return layout.attend(module, (query, key, value), scaling, sliding_window, softcap), None
    if query.is_cuda and softcap is None:
        attended = _on_cuda(layout, query, key, value, scaling, sliding_window)
    else:
        attended = _by_segment(layout, query, key, value, scaling, sliding_window, softcap)
    return attended, None


def _by_segment(
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    # One split and one concatenation: a slice for each segment would cost a whole tensor of zeros in the backward pass.
    queries, keys, values = (tensor.split(layout.lengths, dim=2) for tensor in (query, key, value))
    starts = np.concatenate([[0], np.cumsum(layout.lengths)]).tolist()
    outputs = []
    for number, prefix in enumerate(layout.prefixes):
        k, v = keys[number], values[number]
        if prefix:
            owner = int(np.searchsorted(starts, prefix[0], side="right")) - 1
            first, length = prefix[0] - starts[owner], prefix[1] - prefix[0]
            k = torch.cat([keys[owner].narrow(2, first, length), k], dim=2)
            v = torch.cat([values[owner].narrow(2, first, length), v], dim=2)
        outputs.append(_attend(queries[number], k, v, scaling, window, softcap))
    return torch.cat([each.transpose(1, 2) for each in outputs], dim=1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    num_queries, num_keys = query.shape[2], key.shape[2]
    if softcap is not None:
        return _attend_softly(query, key, value, scaling, _mask(num_queries, num_keys, window, query.device), softcap)
    is_grouped = query.shape[1] != key.shape[1]
    if num_queries == num_keys and (window is None or num_keys <= window):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=is_grouped)
    mask = _mask(num_queries, num_keys, window, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=is_grouped)


def _attend_last(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """One query that sees all keys; heads that share keys are queries of one head, which is much less work."""
    if window is not None:
        key, value = key[:, :, -window:], value[:, :, -window:]
    grouped = query.reshape(1, key.shape[1], -1, query.shape[3])
    return F.scaled_dot_product_attention(grouped, key, value, scale=scaling).reshape(query.shape)


def _mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query sees: the last query sees the last key."""
    distance = torch.arange(num_keys, device=device)[None, :] - torch.arange(num_queries, device=device)[:, None]
    distance = distance - (num_keys - num_queries)
    seen = distance <= 0
    return seen if window is None else seen & (distance > -window)


def _attend_softly(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, mask: Tensor, softcap: float
) -> Tensor:
    """The capped scores that no fused kernel on a CPU knows."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap
    weights = scores.float().masked_fill(~mask, -torch.inf).softmax(-1).to(value.dtype)
    return weights @ value


def _on_cuda(
    layout: Layout, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if layout.key_places is not None:
        key, value = key[layout.key_places], value[layout.key_places]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    attended = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        layout.query_starts,
        layout.key_starts,
        max(layout.lengths),
        max(layout.key_lengths),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
    )
    assert isinstance(attended, Tensor)
    return attended.unsqueeze(0)
