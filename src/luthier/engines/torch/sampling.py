"""Generation with the weights as they stand, through transformers' own generate and a standard attention."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from luthier.engines.torch.loading import own_attention
from luthier.engines.verbs import SampleParams

_AT_ONCE = 32


@torch.no_grad()
def sample_tokens(model: Any, prompts: Sequence[Sequence[int]], params: SampleParams) -> list[list[int]]:
    """What follows each prompt, up to and without the first stop token."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    found: dict[int, list[int]] = {}
    was_training = model.training
    model.eval()
    try:
        with own_attention(model), warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(params.seed)
            for start in range(0, len(order), _AT_ONCE):
                chosen = order[start : start + _AT_ONCE]
                drawn = _generate(model, [list(prompts[number]) for number in chosen], params)
                found |= dict(zip(chosen, drawn, strict=True))
    finally:
        model.train(was_training)
    return [found[number] for number in range(len(prompts))]


def _generate(model: Any, prompts: list[list[int]], params: SampleParams) -> list[list[int]]:
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
        **drawn,
    )
    return [_until_stop(row, stops) for row in output[:, width:].tolist()]


def _until_stop(tokens: list[int], stops: list[int]) -> list[int]:
    first = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:first]
