"""Generation with the weights as they stand, through transformers' own generate and a standard attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.data.pack import lay_out_step
from luthier.engines.torch.loading import Loaded, holds_when_packed, load_for_sampling, own_attention, run_base
from luthier.engines.verbs import Bools, SampleParams, Tick, batch_of
from luthier.machine import find_machine
from luthier.runs.resolve import ResolvedModel

_PROMPTS_AT_ONCE = 256
_TOKENS_AT_ONCE = 32_768
_SCORED_AT_ONCE = 4096
_SMALL_PARAMETERS = 20_000_000


def build_sampler(resolved: ResolvedModel, home: Path) -> TorchSampler:
    """A model loaded to answer with, in the format this machine computes best in."""
    machine = find_machine()
    return TorchSampler(load_for_sampling(resolved, home, precision=machine.precision, device=machine.device))


class TorchSampler:
    """A loaded model that is asked and measured."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SampleParams, tick: Tick | None = None
    ) -> list[list[int]]:
        """Tokens that follow each prompt."""
        return sample_tokens(self._loaded.model, prompts, params, tick)

    def stream(self, prompt: Sequence[int], params: SampleParams, hear: Callable[[int], None]) -> list[int]:
        """Tokens that follow one prompt, each told as soon as it is there."""
        listener = _Listener(hear, params.stop_tokens)
        with _answering(self._loaded.model, params.seed):
            return _generate(self._loaded.model, [list(prompt)], params, listener)[0]

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]], counted: Sequence[Bools] | None = None) -> list[float]:
        """The log-probability of what is counted of each sequence, packed where the model allows it."""
        budget = _SCORED_AT_ONCE if holds_when_packed(self._loaded) else 1
        found = dict[int, float]()
        for chosen in lay_out_step([len(sequence) for sequence in sequences], budget):
            masks = [counted[number] for number in chosen] if counted is not None else None
            batch = batch_of([sequences[number] for number in chosen], masks)
            hidden = run_base(self._loaded, batch)[torch.from_numpy(batch.sources).to(self._loaded.device)]
            targets = torch.from_numpy(batch.targets).to(self._loaded.device)
            logprobs = self._loaded.head.score(hidden, targets, with_hits=False)[0].double().cpu().numpy()
            owners = np.repeat(np.arange(len(chosen)), np.diff(batch.offsets))
            found |= dict(zip(chosen, np.bincount(owners, logprobs, len(chosen)).tolist(), strict=True))
        return [found[number] for number in range(len(sequences))]


class _Listener:
    """What transformers tells of the tokens as they come: the prompt first, then one at a time."""

    def __init__(self, hear: Callable[[int], None], stops: Sequence[int]) -> None:
        self._hear, self._stops, self._is_prompt = hear, frozenset(stops), True

    def put(self, value: Any) -> None:
        """Take in some tokens."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            if token not in self._stops:
                self._hear(token)

    def end(self) -> None:
        """Nothing more comes."""


@torch.no_grad()
def sample_tokens(
    model: Any, prompts: Sequence[Sequence[int]], params: SampleParams, tick: Tick | None = None
) -> list[list[int]]:
    """What follows each prompt, up to and without the first stop token."""
    found: dict[int, list[int]] = {}
    with _answering(model, params.seed):
        # A state that goes from token to token takes in the padding, unless the model sees to that itself.
        can_pad = not getattr(model, "_is_stateful", False)
        for chosen in _groups(prompts, params.max_tokens, can_pad=can_pad):
            drawn = _generate(model, [list(prompts[number]) for number in chosen], params)
            found |= dict(zip(chosen, drawn, strict=True))
            if tick:
                tick(len(found), len(prompts))
    return [found[number] for number in range(len(prompts))]


@contextmanager
def _answering(model: Any, seed: int) -> Iterator[None]:
    """The model as it answers, with draws of its own that leave everybody else's as they were."""
    was_training = model.training
    model.eval()
    try:
        with own_attention(model), _plain_generation(model), torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)


def _groups(prompts: Sequence[Sequence[int]], max_tokens: int, *, can_pad: bool = True) -> Iterator[list[int]]:
    """Prompts of about one length together, as many as their keys and values leave room for; the longest first."""
    chosen: list[int] = []
    for number in sorted(range(len(prompts)), key=lambda number: -len(prompts[number])):
        longest = len(prompts[chosen[0]]) if chosen else 0
        is_full = len(chosen) >= _PROMPTS_AT_ONCE or (len(chosen) + 1) * (longest + max_tokens) > _TOKENS_AT_ONCE
        if chosen and (is_full or not (can_pad or len(prompts[number]) == longest)):
            yield chosen
            chosen = []
        chosen.append(number)
    if chosen:
        yield chosen


@contextmanager
def few_threads(model: Any) -> Iterator[None]:
    """A small model computes with one thread, since more would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    if model.device.type == "cpu" and model.num_parameters() < _SMALL_PARAMETERS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Tokens as the model rates them: what its own folder asks of generation (penalties, a temperature) is left out."""
    from transformers import GenerationConfig

    config = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        with warnings.catch_warnings(), few_threads(model):
            warnings.simplefilter("ignore")
            yield
    finally:
        model.generation_config = config


def _generate(
    model: Any, prompts: list[list[int]], params: SampleParams, listener: _Listener | None = None
) -> list[list[int]]:
    """Padded on the left, which a standard attention's mask makes invisible."""
    stops = list(params.stop_tokens)
    pad = stops[0] if stops else 0
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if params.temperature > 0:
        drawn = {"do_sample": True, "temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k}
    output = model.generate(
        input_ids=ids,
        attention_mask=seen,
        max_new_tokens=params.max_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad,
        use_cache=True,
        streamer=listener,
        **drawn,
    )
    return [_until_stop(row, stops) for row in output[:, width:].tolist()]


def _until_stop(tokens: list[int], stops: list[int]) -> list[int]:
    first = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:first]
