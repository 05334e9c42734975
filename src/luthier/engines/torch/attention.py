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
