"""A model that a service answers for: many prompts at once, each with a seed of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from luthier.engines.tinker.address import find_service
from luthier.engines.tinker.connection import Connection
from luthier.engines.tinker.saving import SAMPLER, find_place
from luthier.engines.verbs import Bools, SampleParams, Tick
from luthier.errors import ModelError
from luthier.runs.resolve import ResolvedModel

_SEEDS = 1 << 31


def build_sampler(resolved: ResolvedModel, home: Path) -> ServiceSampler:
    """What answers for a model of the service: saved weights that an adapter's folder names, or a base by its name."""
    del home
    connection = Connection(find_service())
    if not resolved.adapters:
        return ServiceSampler(connection, connection.create_sampler(base=resolved.name))
    folder = resolved.adapters[-1].path
    place = find_place(folder)
    if place is None or SAMPLER not in place.paths:
        raise ModelError(
            f"{folder}: names no weights on a Tinker service", hint='only runs of engine.kind = "tinker" have some'
        )
    return ServiceSampler(connection, connection.create_sampler(path=place.paths[SAMPLER]))


class ServiceSampler:
    """A model of a service that is asked and measured."""

    def __init__(self, connection: Connection, client: Any) -> None:
        self._connection, self._client = connection, client

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SampleParams, tick: Tick | None = None
    ) -> list[list[int]]:
        """Tokens that follow each prompt, without the stop token."""
        futures = [self._ask(prompt, params, number) for number, prompt in enumerate(prompts)]
        found = []
        for number, future in enumerate(futures):
            answer = self._connection.wait(future, f"answer {number + 1} of {len(futures)}")
            found.append(_until_stop(list(answer.sequences[0].tokens), params.stop_tokens))
            if tick:
                tick(len(found), len(futures))
        return found

    def stream(self, prompt: Sequence[int], params: SampleParams, hear: Callable[[int], None]) -> list[int]:
        """Tokens that follow one prompt; a service answers when it has them all."""
        tokens = self.sample([prompt], params)[0]
        for token in tokens:
            hear(token)
        return tokens

    def score(self, sequences: Sequence[Sequence[int]], counted: Sequence[Bools] | None = None) -> list[float]:
        """The log-probability of what is counted of each sequence."""
        from tinker import types

        futures = [self._client.compute_logprobs(types.ModelInput.from_ints(list(each))) for each in sequences]
        found = []
        for number, future in enumerate(futures):
            logprobs = self._connection.wait(future, f"rating text {number + 1} of {len(futures)}")
            mask = None if counted is None else counted[number]
            found.append(sum(_counted(logprobs, mask)))
        return found

    def close(self) -> None:
        """Finish the session."""
        self._connection.close()

    def _ask(self, prompt: Sequence[int], params: SampleParams, number: int) -> Any:
        from tinker import types

        how = types.SamplingParams(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k or -1,
            seed=(params.seed * 1_000_003 + number) % _SEEDS,
            stop=list(params.stop_tokens),
        )
        return self._client.sample(types.ModelInput.from_ints(list(prompt)), 1, how)


def _until_stop(tokens: list[int], stops: Sequence[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in stops), len(tokens))]


def _counted(logprobs: Sequence[float | None], mask: Bools | None) -> list[float]:
    """Of every token but the first, whose log-probability nobody knows."""
    places = range(1, len(logprobs))
    return [float(logprobs[place] or 0.0) for place in places if mask is None or mask[place]]
