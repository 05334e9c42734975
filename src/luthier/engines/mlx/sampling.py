"""Generation and scoring with the weights as they stand, through mlx_lm's own continuous batching."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from luthier.data.pack import lay_out_step
from luthier.engines.mlx.head import chunks, rate
from luthier.engines.mlx.layout import lay_out
from luthier.engines.mlx.loading import Loaded, choose_device, find_device, load_for_sampling
from luthier.engines.verbs import Batch, Bools, Floats, SampleParams, Tick, batch_of
from luthier.machine import find_machine
from luthier.runs.resolve import ResolvedModel

_TOKENS_AT_ONCE = 16_384
_PROMPTS_AT_ONCE = 32
_SCORED_AT_ONCE = 4096
# What a cache says that cannot hold several rows at once.
_NOT_BATCHED = (ValueError, TypeError, AttributeError, NotImplementedError)


def build_sampler(resolved: ResolvedModel, home: Path) -> MlxSampler:
    """A model loaded to answer with, in the format this machine computes best in."""
    device = find_device()
    choose_device(device)
    return MlxSampler(load_for_sampling(resolved, home, precision=find_machine(engine="mlx").precision))


class MlxSampler:
    """A loaded model that is asked and measured."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SampleParams, tick: Tick | None = None
    ) -> list[list[int]]:
        """Tokens that follow each prompt."""
        return sample_tokens(self._loaded, prompts, params, tick)

    def stream(self, prompt: Sequence[int], params: SampleParams, hear: Callable[[int], None]) -> list[int]:
        """Tokens that follow one prompt, each told as soon as it is there."""
        self._loaded.check_length(len(prompt) + params.max_tokens)
        mx.random.seed(params.seed)
        return _one(self._loaded, prompt, params, hear)

    def score(self, sequences: Sequence[Sequence[int]], counted: Sequence[Bools] | None = None) -> list[float]:
        """The log-probability of what is counted of each sequence."""
        found = dict[int, float]()
        for chosen in lay_out_step([len(sequence) for sequence in sequences], _SCORED_AT_ONCE):
            masks = [counted[number] for number in chosen] if counted is not None else None
            batch = batch_of([sequences[number] for number in chosen], masks)
            owners = np.repeat(np.arange(len(chosen)), np.diff(batch.offsets))
            summed = np.bincount(owners, _logprobs(self._loaded, batch), len(chosen)).tolist()
            found |= dict(zip(chosen, summed, strict=True))
        return [found[number] for number in range(len(sequences))]


def _logprobs(loaded: Loaded, batch: Batch) -> Floats:
    found = np.zeros(len(batch.targets), np.float64)
    for part in lay_out(batch, together=loaded.is_padded):
        loaded.check_length(part.places.shape[1])
        states = loaded.parts.decoder(mx.array(batch.tokens[part.places].astype(np.int32)))
        hidden = states[mx.array(part.rows), mx.array(part.columns)]
        targets = mx.array(batch.targets[part.targets].astype(np.int32))
        for rows in chunks(len(part.targets), loaded.vocabulary):
            found[part.targets[rows]] = np.array(rate(loaded.parts.logits(hidden[rows]), targets[rows]))
    return found


def sample_tokens(
    loaded: Loaded, prompts: Sequence[Sequence[int]], params: SampleParams, tick: Tick | None = None
) -> list[list[int]]:
    """What follows each prompt, up to and without the first stop token."""
    if params.max_tokens < 1 or not prompts:
        return [[] for _ in prompts]
    loaded.check_length(max(map(len, prompts)) + params.max_tokens)
    mx.random.seed(params.seed)  # nothing else of ours draws by MLX's own numbers
    try:
        return _together(loaded, prompts, params, tick)
    except _NOT_BATCHED:
        found = []
        for prompt in prompts:
            found.append(_one(loaded, prompt, params))
            if tick:
                tick(len(found), len(prompts))
        return found


def _sampler(params: SampleParams) -> Any:
    from mlx_lm.sample_utils import make_sampler

    return make_sampler(temp=params.temperature, top_p=params.top_p if params.top_p < 1 else 0.0, top_k=params.top_k)


def _together(
    loaded: Loaded, prompts: Sequence[Sequence[int]], params: SampleParams, tick: Tick | None
) -> list[list[int]]:
    from mlx_lm.generate import BatchGenerator

    found: list[list[int]] = [[] for _ in prompts]
    done = 0
    for chosen in _groups(prompts, params.max_tokens):
        generator = BatchGenerator(
            loaded.model,
            stop_tokens=[[token] for token in params.stop_tokens],
            sampler=_sampler(params),
            completion_batch_size=len(chosen),
            prefill_batch_size=len(chosen),
            stream=mx.default_stream(mx.default_device()),
        )
        numbers = generator.insert([list(prompts[number]) for number in chosen], [params.max_tokens] * len(chosen))
        owners = dict(zip(numbers, chosen, strict=True))
        try:
            while answers := generator.next_generated():
                for answer in answers:
                    if answer.finish_reason != "stop":
                        found[owners[answer.uid]].append(int(answer.token))
        finally:
            generator.close()
        done += len(chosen)
        if tick:
            tick(done, len(prompts))
    return found


def _groups(prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
    """Prompts of about one length together, as many as their keys and values leave room for; the longest first."""
    chosen: list[int] = []
    for number in sorted(range(len(prompts)), key=lambda number: -len(prompts[number])):
        longest = len(prompts[chosen[0]]) if chosen else 0
        is_full = len(chosen) >= _PROMPTS_AT_ONCE or (len(chosen) + 1) * (longest + max_tokens) > _TOKENS_AT_ONCE
        if chosen and is_full:
            yield chosen
            chosen = []
        chosen.append(number)
    if chosen:
        yield chosen


def _one(
    loaded: Loaded, prompt: Sequence[int], params: SampleParams, hear: Callable[[int], None] | None = None
) -> list[int]:
    from mlx_lm.generate import generate_step

    found: list[int] = []
    steps = generate_step(
        mx.array(list(prompt)),
        loaded.model,
        stream=mx.default_stream(mx.default_device()),
        max_tokens=params.max_tokens,
        sampler=_sampler(params),
    )
    for token, _ in steps:
        if int(token) in params.stop_tokens:
            break
        found.append(int(token))
        if hear:
            hear(int(token))
    return found
