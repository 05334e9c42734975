"""Probe logits: what the live model says at a few fixed places, so that what lies on disk can be held against it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save

from luthier.data.prepared import Prepared
from luthier.engines.verbs import Batch, Engine
from luthier.runs.manifest import write_durably

_PROMPTS = 4
_PLACES = 4
_LONGEST = 64


def write_probe(path: Path, engine: Engine, prepared: Prepared, vocabulary: int) -> None:
    """Log-probabilities of every token at the last places of a few prompts, with the tokens they follow."""
    examples = [*prepared.valid[:_PROMPTS].tolist(), *prepared.train[:_PROMPTS].tolist()][:_PROMPTS]
    tensors = {}
    for number, example in enumerate(examples):
        tokens = prepared.tokens_of(prepared.sequences_of(int(example))[0])[:_LONGEST].astype(np.int64)
        tensors[f"tokens_{number}"] = tokens
        tensors[f"logprobs_{number}"] = _logprobs(engine, tokens, vocabulary)
    write_durably(path, save(tensors))


def _logprobs(engine: Engine, tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    places = np.arange(len(tokens))[-_PLACES:]
    whole = np.array([[0, len(tokens)]])
    every = np.broadcast_to(np.arange(vocabulary), (len(places), vocabulary)).copy()
    ends = np.array([0, len(places)])
    batch = Batch(tokens, whole, np.zeros_like(whole), places, every, ends, np.zeros(1, np.int64))
    found: np.ndarray = engine.forward(batch).result().logprobs.astype(np.float32)
    return found
