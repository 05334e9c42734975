"""One stream of tokens with draws of its own, and what a prompt's own tokens are rated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from luthier.engines.torch.head import Head
from luthier.engines.verbs import Drawn, PromptAsk, PromptRated, SampleParams

_RATED_ROWS = 128


@dataclass
class Stream:
    """One answer on its way."""

    id: int
    params: SampleParams
    likeliest: int = 0
    last: int = 0
    draws: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.draws = torch.Generator().manual_seed(self.params.seed % 2**63)

    def draw(self, logits: Tensor, prompt: PromptRated | None = None) -> Drawn:
        """The next token by the stream's own draws, from the logits of one place."""
        logits = logits.float()
        logprobs = logits.log_softmax(-1)
        self.last = int(logits.argmax()) if self.params.temperature <= 0 else self._random(logits)
        top = None
        if self.likeliest:
            values, tokens = logprobs.topk(min(self.likeliest, len(logprobs)))
            top = tokens.cpu().numpy(), values.cpu().numpy()
        return Drawn(self.id, self.last, float(logprobs[self.last]), top, prompt)

    def _random(self, logits: Tensor) -> int:
        params = self.params
        chances = (logits / params.temperature).softmax(-1)
        tokens = None
        if params.top_k > 0:
            chances, tokens = chances.topk(min(params.top_k, len(chances)))
        elif params.top_p < 1:
            chances, tokens = chances.sort(descending=True, stable=True)
        if params.top_p < 1:
            # Of what top_k left. The token that crosses the limit stays, so one always does.
            limit = params.top_p * chances.sum()
            chances = chances[: int((chances.cumsum(0) < limit).sum()) + 1]
        sums = chances.double().cumsum(0)
        place = float(torch.rand((), generator=self.draws, dtype=torch.float64)) * float(sums[-1])
        found = min(int(torch.searchsorted(sums, place, right=True)), len(sums) - 1)
        return found if tokens is None else int(tokens[found])


@dataclass
class Group:
    """A prompt, and the streams that go on from it."""

    prompt: list[int]
    adapter: str | None
    streams: list[Stream]
    rated: PromptAsk | None = None
    fed: int = 0
    """How much of the prompt went through the model."""
    rates: list[PromptRated] = field(default_factory=list)

    @property
    def temperature(self) -> float:
        """That of its streams."""
        return self.streams[0].params.temperature

    def rate(self, head: Head, hidden: Tensor, start: int) -> None:
        """Rate what follows hidden states of the prompt's tokens from `start` on, as far as it was asked for."""
        if self.rated is None:
            return
        first, last = max(start, self.rated.first), min(start + len(hidden), len(self.prompt) - 1)
        for begin in range(first, last, _RATED_ROWS):
            end = min(begin + _RATED_ROWS, last)
            logits = head.rate(hidden[begin - start : end - start])
            self.rates.append(_rate(logits, self.prompt[begin + 1 : end + 1], self.rated, begin, self.temperature))

    def rating(self, vocabulary: int) -> PromptRated | None:
        """All that was rated of the prompt."""
        if self.rated is None:
            return None
        nothing = _rate(torch.zeros(0, vocabulary), [], self.rated, len(self.prompt) - 1, 1.0)
        return _join([*self.rates, nothing])


def _rate(logits: Tensor, tokens: Sequence[int], ask: PromptAsk, start: int, temperature: float) -> PromptRated:
    """The places of some logits; `start` is the first one's number."""
    logprobs = logits.log_softmax(-1)
    device = logits.device

    def of(chosen: Tensor) -> np.ndarray:
        return logprobs.gather(1, chosen).cpu().numpy()

    found = of(torch.tensor(tokens, dtype=torch.long, device=device)[:, None])[:, 0]
    likeliest = targets = drawn = None
    if ask.likeliest:
        values, indices = logprobs.topk(min(ask.likeliest, logprobs.shape[1]))
        likeliest = indices.cpu().numpy(), values.cpu().numpy()
    if ask.targets is not None:
        targets = of(torch.from_numpy(ask.targets[start : start + len(tokens)]).to(device))
    if ask.drawn:
        chosen = _draw_beside(logits, ask, start, temperature)
        drawn = chosen.cpu().numpy(), of(chosen)
    return PromptRated(found, likeliest, targets, drawn)


def _draw_beside(logits: Tensor, ask: PromptAsk, start: int, temperature: float) -> Tensor:
    """Tokens drawn at each place, by a generator of its own."""
    if temperature <= 0:
        return logits.argmax(1, keepdim=True).expand(-1, ask.drawn)
    draws = torch.Generator().manual_seed((ask.seed + start) % 2**63)
    places = torch.rand(len(logits), ask.drawn, generator=draws, dtype=torch.float64).to(logits.device)
    sums = (logits / temperature).softmax(-1).double().cumsum(1)
    return torch.searchsorted(sums, places * sums[:, -1:], right=True).clamp(max=logits.shape[1] - 1)


def _join(parts: Sequence[PromptRated]) -> PromptRated:
    def pairs(found: list[tuple[np.ndarray, np.ndarray] | None]) -> tuple[np.ndarray, np.ndarray] | None:
        known = [each for each in found if each is not None]
        return (np.concatenate([a for a, _ in known]), np.concatenate([b for _, b in known])) if known else None

    targets = [part.targets for part in parts if part.targets is not None]
    return PromptRated(
        np.concatenate([part.logprobs for part in parts]),
        pairs([part.likeliest for part in parts]),
        np.concatenate(targets) if targets else None,
        pairs([part.drawn for part in parts]),
    )
