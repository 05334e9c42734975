"""A sampler whose answers and likelihoods are written down, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from luthier.engines.verbs import SampleParams, Tick


class Scripted:
    """Answers by a function of the prompt's tokens; every token of a text costs the same."""

    def __init__(self, answer: Callable[[list[int]], list[int]], loss: float = 0.5) -> None:
        self._answer, self._loss = answer, loss
        self.params: SampleParams | None = None

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SampleParams, tick: Tick | None = None
    ) -> list[list[int]]:
        self.params = params
        if tick:
            tick(len(prompts), len(prompts))
        return [self._answer(list(prompt))[: params.max_tokens] for prompt in prompts]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        return [-self._loss * (len(sequence) - 1) for sequence in sequences]
