"""Sampling: greedy answers are what the model rates highest, whatever stands beside them in a batch."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from luthier.engines.verbs import SampleParams
from luthier.runs.resolve import AdapterRef, ResolvedModel
from tests.unit.engines.conftest import Shaped
from tests.unit.engines.tiny import SHAPES, VOCAB, load_plain
from tests.unit.engines.torch.test_loading import save, train

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]
PROMPTS = [[5, 9, 14], [7], [30, 31, 32, 33, 34, 35, 36, 37, 38], [99, 3, 50, 61]]
NO_STOP = SampleParams(max_tokens=6)


def likeliest(model: Any, prompt: list[int], count: int, **penalty: Any) -> list[int]:
    """One token after another, by a whole forward pass each."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def sampler_of(base: Path, home: Path, *adapters: AdapterRef) -> Any:
    from luthier.engines.torch.loading import load_for_sampling
    from luthier.engines.torch.sampling import TorchSampler

    resolved = ResolvedModel(base, adapters, name="tiny")
    return TorchSampler(load_for_sampling(resolved, home, precision="fp32", device="cpu"))


@pytest.mark.parametrize("kind", SHAPES)
def test_greedy_answers_are_the_likeliest_tokens_alone_and_together(kind: str, shaped: Shaped, tmp_path: Path) -> None:
    base = shaped(kind)
    plain = load_plain(base)
    heard: list[tuple[int, int]] = []
    found = sampler_of(base, tmp_path).sample(PROMPTS, NO_STOP, lambda done, count: heard.append((done, count)))
    assert found == [likeliest(plain, prompt, 6) for prompt in PROMPTS]
    assert heard[-1] == (4, 4)


def test_answers_end_before_the_first_stop_token(shaped: Shaped, tmp_path: Path) -> None:
    base = shaped("llama")
    plain = load_plain(base)
    whole = [likeliest(plain, prompt, 6) for prompt in PROMPTS]
    stops = (whole[0][2], whole[1][0])
    found = sampler_of(base, tmp_path).sample(PROMPTS, SampleParams(max_tokens=6, stop_tokens=stops))
    for tokens, answer in zip(whole, found, strict=True):
        first = min((tokens.index(stop) for stop in stops if stop in tokens), default=6)
        assert answer == tokens[:first]
    assert found[1] == []


def test_what_a_model_folder_asks_of_generation_does_not_bend_the_answers(shaped: Shaped, tmp_path: Path) -> None:
    base = shaped("llama")
    plain = sampler_of(base, tmp_path).sample(PROMPTS, NO_STOP)
    bent = tmp_path / "bent"
    bent.mkdir()
    for path in base.iterdir():
        (bent / path.name).write_bytes(path.read_bytes())
    wishes = {
        "repetition_penalty": 5.0,
        "do_sample": True,
        "temperature": 2.0,
        "max_length": 3,
        "eos_token_id": plain[0][0],
    }
    (bent / "generation_config.json").write_bytes(orjson.dumps(wishes))
    sampler = sampler_of(bent, tmp_path)
    assert sampler.sample(PROMPTS, NO_STOP) == plain
    assert sampler._loaded.model.generation_config.repetition_penalty == 5.0


def test_drawn_answers_repeat_by_seed_and_leave_the_callers_numbers_alone(shaped: Shaped, tmp_path: Path) -> None:
    sampler = sampler_of(shaped("llama"), tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawn = [sampler.sample(PROMPTS, SampleParams(6, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_prompts_are_grouped_by_length_within_a_budget() -> None:
    from luthier.engines.torch.sampling import _groups

    draw = np.random.default_rng(0)
    prompts = [[1] * int(length) for length in draw.integers(1, 3000, 400)]
    groups = list(_groups(prompts, 100))
    assert sorted(number for group in groups for number in group) == list(range(400))
    for group in groups:
        longest = max(len(prompts[number]) for number in group)
        assert len(group) == 1 or (len(group) <= 256 and len(group) * (longest + 100) <= 32_768)
    edges = [(max(len(prompts[n]) for n in group), min(len(prompts[n]) for n in group)) for group in groups]
    assert all(before[1] >= after[0] for before, after in pairwise(edges))
    assert len(list(_groups([[1]] * 600, 1))) == 3
    assert list(_groups([[1] * 50_000, [1]], 10)) == [[0], [1]]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_scores_are_the_log_probabilities_of_the_texts(kind: str, shaped: Shaped, tmp_path: Path) -> None:
    base = shaped(kind)
    plain = load_plain(base)
    texts = [list(np.random.default_rng(n).integers(3, VOCAB, 5 + 7 * n)) for n in range(4)]
    expected = []
    for text in texts:
        with torch.no_grad():
            logprobs = plain(torch.tensor([text])).logits[0, :-1].float().log_softmax(-1)
        expected.append(float(logprobs.gather(1, torch.tensor(text[1:])[:, None]).sum()))
    assert sampler_of(base, tmp_path).score(texts) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_trained_adapter_answers_as_the_engine_that_trained_it(method: str, shaped: Shaped, tmp_path: Path) -> None:
    from tests.unit.engines.tiny import build_engine, make_plan

    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    base = shaped("llama")
    keys = {"double_quant": False} if method == "qlora" else {}
    engine = build_engine(base, tmp_path, make_plan(method, keys=keys, keeps_dequantised=True))
    train(engine, steps=6)
    adapter = save(engine, tmp_path / "adapter")
    ref = AdapterRef(adapter, quantised=method == "qlora", double_quant=False)
    sampler = sampler_of(base, tmp_path, ref)
    texts = [[5, 9, 14, 80, 3, 77, 20], [40, 41, 42, 43, 44]]
    mine = engine.sample(PROMPTS, NO_STOP).result()
    assert sampler.sample(PROMPTS, NO_STOP) == mine
    assert mine != sampler_of(base, tmp_path).sample(PROMPTS, NO_STOP)
    from luthier.engines.torch.sampling import TorchSampler

    assert sampler.score(texts) == pytest.approx(TorchSampler(engine._loaded).score(texts), rel=1e-5)
    if method == "qlora":  # the 4-bit values of the base are made once, for training and for every measurement
        assert len(list((tmp_path / "nf4").iterdir())) == 1


@pytest.mark.parametrize("kind", SHAPES)
def test_a_stream_says_what_a_batch_answers(kind: str, shaped: Shaped, tmp_path: Path) -> None:
    sampler = sampler_of(shaped(kind), tmp_path)
    (whole,) = sampler.sample(PROMPTS[:1], NO_STOP)
    for params in (NO_STOP, SampleParams(max_tokens=6, stop_tokens=(whole[3],))):
        heard: list[int] = []
        found = sampler.stream(PROMPTS[0], params, heard.append)
        assert found == heard == sampler.sample(PROMPTS[:1], params)[0]
    drawn = [sampler.stream(PROMPTS[0], SampleParams(6, temperature=1.0, seed=seed), heard.append) for seed in (1, 1)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("kind", SHAPES)
def test_only_what_is_counted_is_scored(kind: str, shaped: Shaped, tmp_path: Path) -> None:
    sampler = sampler_of(shaped(kind), tmp_path)
    texts = [[5, 9, 14, 3], [7, 8, 60, 61, 62], [30, 31]]
    none = [np.zeros(len(text), bool) for text in texts]
    every = [np.ones(len(text), bool) for text in texts]
    later = [np.arange(len(text)) > 2 for text in texts]
    first = [text[:3] for text in texts]
    assert sampler.score(texts, every) == pytest.approx(sampler.score(texts), rel=1e-6)
    assert sampler.score(texts, none) == [0.0] * 3
    expected = np.array(sampler.score(texts)) - np.array(sampler.score(first))
    assert sampler.score(texts, later) == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
