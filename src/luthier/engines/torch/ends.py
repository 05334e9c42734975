"""The head of a joined pass: log-probabilities and slopes of every adapter's places, of a shared head together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from luthier.engines.torch.head import Head
from luthier.engines.torch.shared import Low, pull_low
from luthier.engines.verbs import Computed, Floats, Ints, Share


@dataclass
class LowHead(Head):
    """A head under an adapter's low-rank update."""

    low: Low | None = None

    def _product(self, hidden: Tensor, weight: Tensor) -> Tensor:
        assert self.low
        return super()._product(hidden, weight).addmm_(hidden @ self.low.down.T, self.low.up.T, alpha=self.low.scale)

    def _back(self, by_logits: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        assert self.low
        through = pull_low(self.low, by_logits, hidden, hidden @ self.low.down.T)
        return super()._back(by_logits, hidden, weight).addmm_(through, self.low.down)


def put_low(head: Head, low: Low) -> LowHead:
    """The head under an update."""
    return LowHead(head.module, head.softcap, head.scale, low)


@dataclass
class _Part:
    """What one share has of the places, and what is known of them by now."""

    share: Share
    head: Head
    start: int
    targets: Tensor
    logprobs: Tensor
    is_scored: bool = False
    slope: Floats | None = None

    @property
    def active(self) -> Ints:
        """Places that the loss depends on."""
        assert self.slope is not None
        return np.flatnonzero(self.slope.any(1) if self.slope.ndim == 2 else self.slope)

    @property
    def passive(self) -> Ints:
        """Places whose log-probabilities are only told."""
        every = np.arange(len(self.targets))
        return every if self.slope is None else np.setdiff1d(every, self.active, assume_unique=True)


class Ends:
    """The places of a joined pass that predict, in the order of its shares."""

    def __init__(self, hidden: Tensor, shares: Sequence[Share], head_of: Callable[[str], Head]) -> None:
        self._hidden = hidden
        self._parts: list[_Part] = []
        start = 0
        for share in shares:
            targets = self._tensor(share.batch.targets)
            logprobs = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
            self._parts.append(_Part(share, head_of(share.tenant), start, targets, logprobs))
            start += len(targets)

    def pull(self) -> Tensor:
        """The slope of all losses by the hidden states; an adapter's own head gathers its gradients."""
        for part in self._parts:
            assert part.share.loss
            if part.share.loss.weights is not None:
                part.slope = -part.share.loss.weights
        self._score([part for part in self._parts if part.slope is None])
        for part in self._parts:
            assert part.share.loss
            if part.slope is None:
                part.slope = part.share.loss.compute(_numbers(part.logprobs)).slope
        by_hidden = torch.zeros_like(self._hidden)
        for group in _groups(self._parts):
            self._pull(group, by_hidden)
        self._score([part for part in self._parts if not part.is_scored])
        return by_hidden

    def results(self) -> list[Computed]:
        """What each share is told."""
        self._score([part for part in self._parts if not part.is_scored])
        return [_computed(part) for part in self._parts]

    def _score(self, parts: list[_Part]) -> None:
        """Log-probabilities where no slope will be asked for, or must be known before it is."""
        for group in _groups(parts):
            chosen = [part.passive for part in group]
            for part in group:
                part.is_scored = True
            if not any(len(each) for each in chosen):
                continue
            hidden, targets, _ = self._gather(group, chosen)
            found, _ = group[0].head.score(hidden, targets, with_hits=False)
            _scatter(group, chosen, found)

    def _pull(self, group: list[_Part], by_hidden: Tensor) -> None:
        chosen = [part.active for part in group]
        if not any(len(each) for each in chosen):
            return
        hidden, targets, rows = self._gather(group, chosen)
        slopes = []
        for part, each in zip(group, chosen, strict=True):
            assert part.slope is not None
            assert part.share.loss
            slopes.append(part.slope[each] * part.share.loss.scale)
        slope = self._tensor(np.concatenate(slopes)).float()
        head = group[0].head
        found, pulled, _ = head.pull(hidden, targets, slope, head.weight)
        by_hidden[rows] = pulled
        _scatter(group, chosen, found)

    def _gather(self, group: list[_Part], chosen: list[Ints]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states and targets of the chosen places, and which rows they are of all."""
        pairs = list(zip(group, chosen, strict=True))
        rows = self._tensor(np.concatenate([each + part.start for part, each in pairs]))
        targets = torch.cat([part.targets[self._tensor(each)] for part, each in pairs])
        return self._hidden[rows], targets, rows

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._hidden.device)


def _groups(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Parts that go through one head, with targets of one width."""
    found: dict[tuple[int, tuple[int, ...]], list[_Part]] = {}
    for part in parts:
        found.setdefault((id(part.head), tuple(part.targets.shape[1:])), []).append(part)
    yield from found.values()


def _scatter(group: list[_Part], chosen: list[Ints], found: Tensor) -> None:
    start = 0
    for part, each in zip(group, chosen, strict=True):
        part.logprobs[torch.from_numpy(each).to(found.device)] = found[start : start + len(each)]
        start += len(each)


def _numbers(logprobs: Tensor) -> Floats:
    found: Floats = logprobs.double().cpu().numpy()
    return found


def _computed(part: _Part) -> Computed:
    found = _numbers(part.logprobs)
    if part.share.loss is None:
        return Computed(found)
    result = part.share.loss.compute(found)
    return Computed(found, result.value, result.metrics)
