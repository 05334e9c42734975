"""Streams without padding: no neighbour changes a bit, prompts are rated as training rates them, heads of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.engines.verbs import (
    AdapterLayout,
    Batch,
    Drawn,
    Loss,
    LossResult,
    PromptAsk,
    SampleParams,
    Share,
    StepParams,
)
from luthier.runs.resolve import ResolvedModel
from tests.unit.engines.conftest import Shaped
from tests.unit.engines.tiny import VOCAB

pytestmark = pytest.mark.torch
PROMPT = list(range(20, 43))
WARM = SampleParams(8, temperature=1.2, seed=3)


def open_decoder(folder: Path, home: Path, precision: str = "fp32") -> Any:
    from luthier.engines.torch.decoding import build_decoder

    return build_decoder(ResolvedModel(folder, name="tiny"), home, precision=precision)


def every_token(tokens: list[int]) -> Batch:
    """All log-probabilities at every place."""
    count = len(tokens)
    targets = np.broadcast_to(np.arange(VOCAB), (count, VOCAB)).copy()
    whole, nothing = np.array([[0, count]]), np.zeros((1, 2), np.int64)
    ids = np.asarray(tokens, np.int64)
    return Batch(ids, whole, nothing, np.arange(count), targets, np.array([0, count]), np.zeros(1, np.int64))


def publish(decoder: Any, folder: Path, *, seed: int, rank: int = 3) -> str:
    """An adapter of every layer and the head, trained a little, to be sampled from."""
    tenants = decoder.tenants()
    tenants.open("made", AdapterLayout(rank, seed))
    weights = np.random.default_rng(seed).normal(size=(12, VOCAB))
    loss = Loss(lambda found: LossResult(0.0, -weights), weights=weights)
    for _ in range(2):
        tenants.compute([Share("made", every_token(list(range(30, 42))), loss)])
        tenants.keep("made")
        tenants.optim_step("made", StepParams(3e-2))
    folder.mkdir()
    tenants.save("made", "adapter").write(folder)
    decoder.adopt(str(folder), folder)
    return str(folder)


def as_plain(drawn: Drawn) -> tuple[int, float, list[list[float]]]:
    """What a stream is told of one token."""
    return drawn.token, drawn.logprob, [each.tolist() for each in drawn.likeliest or ()]


def draw(decoder: Any, number: int, *streams: int) -> dict[int, list[Drawn]]:
    """As many tokens of each of these streams."""
    found: dict[int, list[Drawn]] = {}
    for _ in range(200):
        for drawn in decoder.step():
            found.setdefault(drawn.stream, []).append(drawn)
            if len(found[drawn.stream]) == number:
                decoder.leave(drawn.stream)
        if all(len(found.get(stream, ())) >= number for stream in streams):
            return found
    raise AssertionError(found)


@pytest.mark.parametrize(("kind", "precision"), [("qwen3", "fp32"), ("llama", "bf16")])
def test_no_neighbour_changes_a_bit(
    kind: str, precision: str, shaped: Shaped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.engines.torch import lanes

    monkeypatch.setattr(lanes, "_FED_TOKENS", 16)  # so that prompts are fed in parts, too
    decoder = open_decoder(shaped(kind), tmp_path, precision)
    own, other = (publish(decoder, tmp_path / str(seed), seed=seed) for seed in (1, 2))
    decoder.join(1, PROMPT, WARM, adapter=own, likeliest=2, rated=PromptAsk(likeliest=2, drawn=2, seed=4))
    alone = draw(decoder, 6, 1)[1]
    for number in range(20):
        prompt = list(range(10, 12 + 3 * number))
        decoder.join(100 + number, prompt, WARM, adapter=(own, other, None)[number % 3])
    decoder.step()
    decoder.join(2, PROMPT, WARM, adapter=own, likeliest=2, rated=PromptAsk(likeliest=2, drawn=2, seed=4))
    beside = draw(decoder, 6, 2)[2]
    assert [as_plain(each) for each in beside] == [as_plain(each) for each in alone]
    one, two = alone[0].prompt, beside[0].prompt
    assert one
    assert two
    assert one.likeliest
    assert two.likeliest
    assert one.drawn
    assert two.drawn
    assert np.array_equal(one.logprobs, two.logprobs)
    assert all(
        np.array_equal(a, b) for a, b in zip((*one.likeliest, *one.drawn), (*two.likeliest, *two.drawn), strict=True)
    )


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "llama", "falcon"])
def test_what_is_sampled_is_what_was_trained(kind: str, shaped: Shaped, tmp_path: Path) -> None:
    """The same log-probabilities of a prompt and of what follows, with a head of its own over a tied base, too."""
    decoder = open_decoder(shaped(kind), tmp_path)
    adapter = publish(decoder, tmp_path / "made", seed=1)
    targets = np.array([[place % VOCAB, 5] for place in range(len(PROMPT) - 1)])
    asked = PromptAsk(likeliest=3, targets=targets)
    decoder.join(1, PROMPT, SampleParams(5), adapter=adapter, rated=asked)
    decoder.join(2, PROMPT, SampleParams(5), rated=asked)
    found = draw(decoder, 5, 1, 2)
    rows: dict[int, Any] = {}
    for stream, tenant in ((1, "made"), (2, "base")):
        if tenant == "base":
            decoder.tenants().open("base", AdapterLayout(1))
        told = [each.token for each in found[stream]]
        (expected,) = decoder.tenants().compute([Share(tenant, every_token(PROMPT + told))])
        rows[stream] = expected.logprobs
        rated = found[stream][0].prompt
        assert rated
        places = np.arange(len(PROMPT) - 1)
        assert np.abs(rated.logprobs - rows[stream][places, PROMPT[1:]]).max() < 2e-4
        assert rated.targets is not None
        assert np.abs(rated.targets - rows[stream][places[:, None], targets]).max() < 2e-4
        assert rated.likeliest
        assert np.abs(rated.likeliest[1] - -np.sort(-rows[stream][places], 1)[:, :3]).max() < 2e-4
        said = [each.logprob for each in found[stream]]
        behind = np.arange(len(PROMPT) - 1, len(PROMPT) + 4)
        assert np.abs(np.array(said) - rows[stream][behind, told]).max() < 2e-4
        assert told == rows[stream][behind].argmax(1).tolist()
    assert np.abs(rows[1][:5] - rows[2][:5]).max() > 0.1


@pytest.mark.parametrize("kind", ["llama", "lfm2"])
def test_streams_of_one_prompt_go_their_own_ways(kind: str, shaped: Shaped, tmp_path: Path) -> None:
    decoder = open_decoder(shaped(kind), tmp_path)
    draws = [(number, SampleParams(8, temperature=2.0, seed=number)) for number in range(1, 6)]
    (first, params), *copies = draws
    decoder.join(first, PROMPT, params, copies=copies)
    together = draw(decoder, 8, *(number for number, _ in draws))
    assert len({str([each.token for each in said]) for said in together.values()}) > 1
    for number, params in draws:
        decoder.join(number, PROMPT, params)
        alone = draw(decoder, 8, number)[number]
        assert [each.token for each in alone] == [each.token for each in together[number]]
