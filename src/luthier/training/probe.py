"""The probe: what the live model says at a few fixed places, so that what lies on disk can be held against it.

Beside it lie the token ids of a few fixed conversations and the tokens that end an answer, as they were in training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from safetensors.numpy import load_file, save

from luthier.data.example import Message
from luthier.data.prepared import Prepared
from luthier.data.reasons import RowError
from luthier.data.tokens import ModelText
from luthier.engines.verbs import Batch, Ints, Trainee
from luthier.errors import ModelError
from luthier.runs.manifest import write_durably

_PROMPTS = 4
PLACES = 4
_LONGEST = 64
CHATS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Write one sentence about the sea."}],
    [
        {"role": "system", "content": "Answer in JSON."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": '{"answer": 4}'},
        {"role": "user", "content": "And twice that?"},
    ],
)
"""Conversations that every template is asked to render; one that it refuses has no tokens."""


@dataclass(frozen=True)
class Probe:
    """What was kept of the live model: tokens with the log-probabilities behind their last places, and its text."""

    tokens: tuple[Ints, ...]
    logprobs: tuple[np.ndarray, ...]
    text: TextFacts


@dataclass(frozen=True)
class TextFacts:
    """What a model folder makes of the fixed conversations, what ends its answers, and a hash of what decides it."""

    chats: tuple[Ints, ...]
    stops: tuple[int, ...]
    hash: str


def write_probe(path: Path, engine: Trainee, prepared: Prepared, vocabulary: int, text: TextFacts) -> None:
    """Log-probabilities of every token at the last places of a few prompts, with the tokens they follow."""
    examples = [*prepared.valid[:_PROMPTS].tolist(), *prepared.train[:_PROMPTS].tolist()][:_PROMPTS]
    tensors: dict[str, np.ndarray] = {}
    for number, example in enumerate(examples):
        tokens = prepared.tokens_of(prepared.sequences_of(int(example))[0])[:_LONGEST].astype(np.int64)
        tensors[f"tokens_{number}"] = tokens
        tensors[f"logprobs_{number}"] = _logprobs(engine, tokens, vocabulary)
    tensors |= {f"chat_{number}": chat for number, chat in enumerate(text.chats)}
    tensors["stops"] = np.array(text.stops, np.int64)
    tensors["text_hash"] = np.frombuffer(bytes.fromhex(text.hash), np.uint8)
    write_durably(path, save(tensors))


def read_probe(path: Path) -> Probe:
    """What `write_probe` wrote; ModelError where it is not there or is none."""
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path.name}: not there", hint="the run wrote it at its end") from None
    except Exception as error:  # safetensors has errors of its own
        raise ModelError(f"{path.name}: cannot be read: {error}") from None
    stops, digest = (tensors.get(name, np.zeros(0, np.int64)) for name in ("stops", "text_hash"))
    text = TextFacts(_numbered(tensors, "chat"), tuple(stops.tolist()), digest.tobytes().hex())
    found = Probe(_numbered(tensors, "tokens"), _numbered(tensors, "logprobs"), text)
    if not found.tokens or len(found.tokens) != len(found.logprobs):
        raise ModelError(f"{path.name}: holds no prompts")
    return found


def read_text_facts(folder: Path, template: Path | None) -> TextFacts:
    """Token ids of the fixed conversations by the folder's tokenizer and template, and its stop tokens."""
    text = ModelText(folder, chat_template=template)
    digest = hashlib.sha256(f"{text.hash} {text.template_hash}".encode()).hexdigest()
    return TextFacts(render_chats(text, CHATS), list_stops(text), digest)


def render_chats(text: ModelText, chats: Sequence[list[Message]]) -> tuple[Ints, ...]:
    """Token ids of conversations that wait for an answer; without a template, of what was said last."""
    template = text.build_template()
    found = []
    for chat in chats:
        try:
            if template is None:
                said = text.text_prefix + str(chat[-1]["content"])
            else:
                said = template.render(chat, add_generation_prompt=True)
        except RowError:
            said = ""
        found.append(np.array(text.tokenizer.encode(said, add_special_tokens=False).ids, np.int64))
    return tuple(found)


def list_stops(text: ModelText) -> tuple[int, ...]:
    """Every token that ends an answer: by the tokenizer, by the config and by the generation settings."""
    named = text.tokenizer.token_to_id(text.eos_token) if text.eos_token else None
    config = _read(text.folder / "config.json")
    tables = (_read(text.folder / "generation_config.json"), config, config.get("text_config") or {})
    found = [named]
    for table in tables:
        ended = table.get("eos_token_id")
        found += ended if isinstance(ended, list) else [ended]
    return tuple(sorted({token for token in found if isinstance(token, int)}))


def _read(path: Path) -> dict[str, Any]:
    found = orjson.loads(path.read_bytes()) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _numbered(tensors: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, ...]:
    count = sum(key.startswith(f"{name}_") for key in tensors)
    return tuple(tensors[f"{name}_{number}"] for number in range(count) if f"{name}_{number}" in tensors)


def _logprobs(engine: Trainee, tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    places = np.arange(len(tokens))[-PLACES:]
    whole = np.array([[0, len(tokens)]])
    every = np.broadcast_to(np.arange(vocabulary), (len(places), vocabulary)).copy()
    ends = np.array([0, len(places)])
    batch = Batch(tokens, whole, np.zeros_like(whole), places, every, ends, np.zeros(1, np.int64))
    found: np.ndarray = engine.forward(batch).result().logprobs.astype(np.float32)
    return found
