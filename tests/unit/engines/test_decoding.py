"""Streams that share a base model say what each would say alone, whenever they come and go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from luthier.engines.registry import load_decoder, load_sampler
from luthier.engines.torch import decoding, sampling
from luthier.engines.verbs import Decoder, Drawn, SampleParams
from luthier.errors import ModelError, UnsupportedError
from luthier.machine import find_machine
from luthier.runs.resolve import AdapterRef, ResolvedModel, find_resolved
from luthier.weights.peft import AdapterConfig, write_adapter
from tests.unit.adapters.runs import MODULES
from tests.unit.engines.tiny import save_shape

pytestmark = pytest.mark.torch
PRACTICE = find_resolved("practice")
PROMPTS = [list(range(40, 52)), [7, 300, 12], list(range(900, 880, -1)), [55] * 6]
GREEDY = SampleParams(12)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 a token near a tie may differ between an adapter that is merged and one that is not."""
    machine = replace(find_machine(), device="cpu", has_bf16=False)
    for module in (decoding, sampling):
        monkeypatch.setattr(module, "find_machine", lambda: machine)


def write_strong(folder: Path, seed: int, rank: int = 3) -> Path:
    """An adapter that changes what is said."""
    source = np.random.default_rng(seed)
    tensors = {}
    for layer in (1, 3):
        for module, (out, into) in MODULES.items():
            name = f"model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A"] = source.normal(size=(rank, into)).astype(np.float32)
            tensors[f"{name}.lora_B"] = source.normal(scale=0.1, size=(out, rank)).astype(np.float32)
    write_adapter(folder, AdapterConfig("practice", rank, 2.0 * rank, targets=("q_proj", "down_proj")), tensors)
    return folder


def run(decoder: Decoder, asked: dict[int, tuple[int, str | None, SampleParams]], tokens: int) -> dict[int, list[int]]:
    """Streams that join one step after another, until each has its tokens."""
    said: dict[int, list[int]] = {}
    waiting = list(asked.items())
    while waiting or any(len(found) < tokens for found in said.values()):
        if waiting:
            stream, (prompt, adapter, params) = waiting.pop(0)
            decoder.join(stream, PROMPTS[prompt], params, adapter=adapter)
            said[stream] = []
        for drawn in decoder.step():
            said[drawn.stream].append(drawn.token)
            if len(said[drawn.stream]) == tokens:
                decoder.leave(drawn.stream)
    return said


def test_adapters_of_many_ranks_share_the_base_and_say_what_each_says_alone(tmp_path: Path) -> None:
    decoder = load_decoder(PRACTICE, tmp_path)
    alone: dict[str | None, list[list[int]]] = {None: load_sampler(PRACTICE, tmp_path).sample(PROMPTS, GREEDY)}
    for seed, name in enumerate(("one", "two", "three"), 1):
        folder = write_strong(tmp_path / name, seed, rank=seed)
        decoder.adopt(name, folder)
        own = ResolvedModel(PRACTICE.folder, (AdapterRef(folder),), name)
        alone[name] = load_sampler(own, tmp_path).sample(PROMPTS, GREEDY)
    assert len({str(found) for found in alone.values()}) == 4
    asked = {
        number: (number % len(PROMPTS), name, GREEDY)
        for number, name in enumerate([None, "one", "two", "three", "one", None, "two"])
    }
    for stream, said in run(decoder, asked, 12).items():
        prompt, name, _ = asked[stream]
        assert said == alone[name][prompt], (stream, name)


def test_draws_are_a_stream_s_own(tmp_path: Path) -> None:
    decoder = load_decoder(PRACTICE, tmp_path)
    warm = SampleParams(12, temperature=1.5, top_p=0.9, top_k=50, seed=4)
    first = run(decoder, {0: (0, None, warm)}, 12)[0]
    beside = run(decoder, {1: (1, None, warm), 2: (0, None, warm), 3: (0, None, SampleParams(12, 1.5, seed=5))}, 12)
    assert beside[2] == first
    assert beside[3] != first


def test_a_limit_on_chances_is_kept(tmp_path: Path) -> None:
    decoder = load_decoder(PRACTICE, tmp_path)
    for stream, params in enumerate(
        [SampleParams(12, 3.0, top_k=1, seed=8), SampleParams(12, 3.0, top_p=1e-9, seed=9), GREEDY]
    ):
        decoder.join(stream, PROMPTS[0], params, likeliest=3)
    for _ in range(6):
        drawn = decoder.step()
        assert len({each.token for each in drawn}) == 1
        for each in drawn:
            check_likeliest(each)


def check_likeliest(drawn: Drawn) -> None:
    assert drawn.likeliest
    tokens, logprobs = drawn.likeliest
    assert len(tokens) == 3
    assert logprobs.tolist() == sorted(logprobs, reverse=True)
    assert drawn.token == tokens[0]
    assert drawn.logprob == pytest.approx(logprobs[0])


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "mistral"])
def test_windows_and_caps_hold_in_a_shared_batch(name: str, tmp_path: Path) -> None:
    base = ResolvedModel(save_shape(tmp_path / name, name), name=name)
    prompts = [[index % 90 + 3 for index in range(start, start + size)] for start, size in ((0, 30), (5, 4), (9, 17))]
    alone = load_sampler(base, tmp_path).sample(prompts, SampleParams(20))
    decoder = load_decoder(base, tmp_path)
    said: dict[int, list[int]] = {number: [] for number in range(3)}
    for step in range(22):
        if step < 3:
            decoder.join(step, prompts[step], SampleParams(20))
        for drawn in decoder.step():
            said[drawn.stream].append(drawn.token)
    assert [said[number][:20] for number in range(3)] == alone


def test_what_is_no_low_rank_update_of_the_base_is_refused(tmp_path: Path) -> None:
    decoder = load_decoder(PRACTICE, tmp_path)
    a, b = np.ones((1, 192), np.float32), np.ones((300, 1), np.float32)
    name = "model.layers.0.self_attn.q_proj"
    write_adapter(
        tmp_path / "shape",
        AdapterConfig("practice", 1, 1.0, targets=("q_proj",)),
        {f"{name}.lora_A": a, f"{name}.lora_B": b},
    )
    with pytest.raises(ModelError, match="another shape"):
        decoder.adopt("shape", tmp_path / "shape")
    whole = {"model.embed_tokens.weight": np.zeros((4, 192), np.float32), f"{name}.lora_A": a, f"{name}.lora_B": b}
    config = AdapterConfig("practice", 1, 1.0, targets=("q_proj",), modules_to_save=("embed_tokens",))
    write_adapter(tmp_path / "whole", config, whole)
    with pytest.raises(UnsupportedError, match="whole"):
        decoder.adopt("whole", tmp_path / "whole")
