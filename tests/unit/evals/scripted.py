"""A sampler whose answers and likelihoods are written down, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from luthier.engines.verbs import Bools, SampleParams, Tick


class Scripted:
    """Answers by a function of the prompt's tokens; every token of a text costs the same."""

    def __init__(self, answer: Callable[[list[int]], list[int]], loss: float = 0.5) -> None:
        self._answer, self._loss = answer, loss
        self.params: SampleParams | None = None
        self.prompts: list[list[int]] = []
        """Every prompt that was asked so far."""

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SampleParams, tick: Tick | None = None
    ) -> list[list[int]]:
        self.params = params
        self.prompts += [list(prompt) for prompt in prompts]
        if tick:
            tick(len(prompts), len(prompts))
        return [self._answer(list(prompt))[: params.max_tokens] for prompt in prompts]

    def stream(self, prompt: Sequence[int], params: SampleParams, hear: Callable[[int], None]) -> list[int]:
        (found,) = self.sample([prompt], params)
        for token in found:
            hear(token)
        return found

    def score(self, sequences: Sequence[Sequence[int]], counted: Sequence[Bools] | None = None) -> list[float]:
        lengths = [len(each) - 1 for each in sequences] if counted is None else [int(each.sum()) for each in counted]
        return [-self._loss * length for length in lengths]
