"""The head and the loss on trained tokens only, in chunks: never the logits of everything, never all in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

# Each length makes the processor's library compile its products anew, a millisecond and a megabyte each, so lengths
# are rounded up.
ROUNDED = 32
_CHUNK_ELEMENTS = 1 << 25
# Rows whose softmax is worked through at once: they stay in the processor's cache.
_CACHE_ELEMENTS = 1 << 20


@dataclass
class Head:
    """The last product of a model, from hidden states to log-probabilities of targets."""

    module: nn.Module
    softcap: float | None = None
    scale: float = 1.0

    @property
    def weight(self) -> Tensor:
        """The product's weight as it stands; part of the graph where it is trained through an adapter."""
        whole = getattr(self.module, "whole_weight", None)
        weight = whole() if whole else self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @torch.no_grad()
    def score(self, hidden: Tensor, targets: Tensor, *, with_hits: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the targets in fp32, and whether each was the likeliest token."""
        weight, count = self.weight.detach(), len(hidden)
        hidden, targets = _rounded(hidden), _rounded(targets)
        logprobs, hits = [], []
        for rows in self._chunks(len(hidden)):
            logits = self._logits(hidden[rows], weight).float()
            chosen = targets[rows]
            found = logits.gather(1, chosen if chosen.dim() == 2 else chosen[:, None]) - logits.logsumexp(1, True)
            logprobs.append(found if chosen.dim() == 2 else found[:, 0])
            if with_hits and chosen.dim() == 1:
                hits.append(logits.argmax(1) == chosen)
        return torch.cat(logprobs)[:count], torch.cat(hits)[:count] if hits else None

    @torch.no_grad()
    def rate(self, hidden: Tensor) -> Tensor:
        """Logits of every token in fp32, for a few hidden states; computed as `score` computes them."""
        return self._logits(_rounded(hidden), self.weight.detach()).float()[: len(hidden)]

    @torch.no_grad()
    def pull(
        self, hidden: Tensor, targets: Tensor, slope: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, dict[Tensor, Tensor]]:
        """Log-probabilities, the slopes by hidden states, and those by weight and bias where they are trained.

        `slope` is that of the loss by each log-probability; it must be known, so this is one pass for SFT and the
        second of two for losses that depend on the log-probabilities.
        """
        count = len(hidden)
        hidden, targets, slope = _rounded(hidden), _rounded(targets), _rounded(slope)
        by_hidden = torch.empty_like(hidden)
        bias = getattr(self.module, "bias", None)
        trained = [each for each in (weight, bias) if each is not None and each.requires_grad]
        by_trained = {each: torch.zeros_like(each, dtype=torch.float32) for each in trained}
        fixed = weight.detach()
        logprobs = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        for rows in self._chunks(len(hidden)):
            logits = self._logits(hidden[rows], fixed)
            by_logits = torch.empty_like(logits)
            for part in self._parts(rows, logits):
                inner = slice(part.start - rows.start, part.stop - rows.start)
                logprobs[part], pulled = self._pull_part(logits[inner], targets[part], slope[part])
                by_logits[inner] = pulled
            by_hidden[rows] = self._back(by_logits, hidden[rows], fixed)
            if weight in by_trained:
                by_trained[weight] += by_logits.T @ hidden[rows]
            if bias in by_trained:
                by_trained[bias] += by_logits.sum(0)
        return logprobs[:count], by_hidden[:count], by_trained

    def _product(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight, getattr(self.module, "bias", None))

    def _back(self, by_logits: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        """The slope by the hidden states from that by the raw product."""
        return by_logits @ weight

    def _logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return self.shape(self._product(hidden, weight))

    def shape(self, logits: Tensor) -> Tensor:
        """The logits as the model gives them, from the raw product."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def _pull_part(self, logits: Tensor, targets: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Slope by the raw product for a few rows: slope * (onehot - softmax), through soft-capping and scale."""
        chosen = targets if targets.dim() == 2 else targets[:, None]
        weights = slope if slope.dim() == 2 else slope[:, None]
        capped = logits.float()
        log_softmax = torch.log_softmax(capped, 1)
        found = log_softmax.gather(1, chosen)
        pulled = log_softmax.exp_().mul_(-weights.sum(1, keepdim=True))
        pulled.scatter_add_(1, chosen, weights.to(pulled.dtype))
        if self.softcap is not None:
            pulled *= 1 - (capped / self.softcap) ** 2
        if self.scale != 1.0:
            pulled *= self.scale
        return (found if targets.dim() == 2 else found[:, 0]), pulled

    def _chunks(self, count: int) -> Iterator[slice]:
        """Chunks of one size as far as that goes, so that their products are compiled once."""
        most = max(64, min(4096, _CHUNK_ELEMENTS // self._width))
        size = _round_up(-(-count // -(-count // most)))
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    def _parts(self, rows: slice, logits: Tensor) -> Iterator[slice]:
        size = rows.stop - rows.start if logits.is_cuda else max(8, _CACHE_ELEMENTS // self._width)
        return (slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size))

    @property
    def _width(self) -> int:
        return int(getattr(self.module, "out_features", 0)) or int(self.weight.shape[0])


def _round_up(count: int) -> int:
    return max(1, -(-count // ROUNDED)) * ROUNDED


def _rounded(rows: Tensor) -> Tensor:
    """The rows and some of zeros, up to a round number."""
    more = _round_up(len(rows)) - len(rows)
    return torch.cat([rows, rows.new_zeros(more, *rows.shape[1:])]) if more else rows


def find_head(model: Any) -> Head:
    """The head of a transformers model, with the caps and scales that its configuration puts on logits."""
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None):
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None):
        scale = 1 / float(config.logits_scaling)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(model.get_output_embeddings(), None if softcap is None else float(softcap), scale)
