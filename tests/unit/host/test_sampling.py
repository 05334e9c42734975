"""Samples as a client asks for them: stops that stay, draws of each sample's own, prompts rated, turns of projects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from luthier.engines.chat import Prompter
from luthier.host.datums import SampleOutput, read_sample_output
from luthier.host.sampling import Sampling
from luthier.host.streams import Streams
from luthier.host.tensors import write_tensor
from luthier.host.work import Done, Work
from luthier.runs.resolve import find_resolved

pytestmark = [pytest.mark.torch, pytest.mark.slow]
QUESTION = "<|im_start|>user\nCopy: hello world<|im_end|>\n<|im_start|>assistant\n"


class Desk:
    """Samples worked off by hand."""

    def __init__(self, decoder: Any, prompter: Prompter) -> None:
        self.streams = Streams(decoder, lambda: None)
        self.sampling = Sampling(self.streams, prompter, vocabulary=decoder.tenants().vocabulary)
        self.prompter = prompter
        self.told: dict[int, Done] = {}
        self.order: list[int] = []
        self._number = 0

    def hear(self, done: Done) -> None:
        self.told[done.id] = done
        self.order.append(done.id)

    def ask(self, *, body: bytes = b"", **facts: Any) -> int:
        self._number += 1
        prompt = self.prompter.text.tokenizer.encode(QUESTION, add_special_tokens=False).ids
        wanted = {"prompt": prompt, "max_tokens": 30, "temperature": 0.0, **facts}
        self.sampling.submit(Work(self._number, "sample", facts=wanted, body=body), self.hear)
        return self._number

    def run(self) -> None:
        while self.streams.has_work():
            self.streams.work()

    def sample(self, **facts: Any) -> SampleOutput:
        number = self.ask(**facts)
        self.run()
        assert self.told[number].error is None
        return read_sample_output(self.told[number].body)

    def text(self, output: SampleOutput, number: int = 0) -> str:
        tokens = output.sequences[number].tokens.tolist()
        return str(self.prompter.text.tokenizer.decode(tokens, skip_special_tokens=False))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Prompter]:
    from luthier.engines.torch.decoding import build_decoder

    resolved = find_resolved("practice")
    return build_decoder(resolved, tmp_path_factory.mktemp("home"), precision="fp32"), Prompter(resolved.folder)


@pytest.fixture
def desk(parts: tuple[Any, Prompter]) -> Iterator[Desk]:
    made = Desk(*parts)
    yield made
    made.sampling.leave(made.hear)
    made.streams.work()


def test_a_stop_ends_a_sample_and_stays_part_of_it(desk: Desk) -> None:
    whole = desk.sample()
    assert whole.sequences[0].stop_reason == "stop"
    assert whole.sequences[0].tokens[-1] in desk.prompter.stops
    text = desk.text(whole)
    stop = text[2:5]
    cut = desk.text(desk.sample(stop_texts=[stop]))
    assert text.startswith(cut)
    assert cut.count(stop) == 1
    assert len(cut.partition(stop)[2]) < 8
    token = int(whole.sequences[0].tokens[1])
    stopped = desk.sample(stop_tokens=[token])
    assert stopped.sequences[0].tokens.tolist() == whole.sequences[0].tokens[:2].tolist()
    endless = desk.sample(with_stops=False)
    assert endless.sequences[0].stop_reason == "length"
    assert len(endless.sequences[0].tokens) == 30


def test_each_sample_has_draws_of_its_own_whoever_is_beside_it(desk: Desk) -> None:
    warm: dict[str, Any] = {
        "temperature": 1.5,
        "seed": 11,
        "with_stops": False,
        "max_tokens": 12,
        "topk_sample_logprobs": 2,
    }
    first = desk.sample(num_samples=5, **warm)
    tokens = [each.tokens.tolist() for each in first.sequences]
    assert len({str(each) for each in tokens}) == 5
    others = [desk.ask(num_samples=9, **{**warm, "seed": seed}) for seed in range(3)]
    again = desk.sample(num_samples=7, **warm)
    assert [each.tokens.tolist() for each in again.sequences][:5] == tokens
    for one, two in zip(first.sequences, again.sequences, strict=False):
        assert one.logprobs is not None
        assert np.array_equal(one.logprobs, two.logprobs)
        assert one.topk is not None
        assert one.topk.tokens.shape == (12, 2)
    assert all(desk.told[number].error is None for number in others)


def test_a_prompt_is_rated_where_it_was_asked(desk: Desk) -> None:
    whole = desk.sample(prompt_logprobs=True, topk_prompt_logprobs=3, max_tokens=1)
    count = len(whole.prompt_logprobs) if whole.prompt_logprobs is not None else 0
    assert whole.prompt_logprobs is not None
    assert np.isnan(whole.prompt_logprobs[0])
    assert np.isfinite(whole.prompt_logprobs[1:]).all()
    assert whole.topk_prompt
    assert whole.topk_prompt.lists()[0] is None
    assert (whole.topk_prompt.logprobs[1:, 0] >= whole.prompt_logprobs[1:]).all()
    last = desk.sample(prompt_logprobs=True, prompt_logprobs_last_n=4, max_tokens=1)
    assert last.prompt_logprobs is not None
    assert np.isnan(last.prompt_logprobs[:-4]).all()
    assert np.array_equal(last.prompt_logprobs[-4:], whole.prompt_logprobs[-4:])
    targets = np.stack([np.full(count - 1, -1), whole.topk_prompt.tokens[1:, 0]], 1)
    rated = desk.sample(body=write_tensor(targets), prompt_alt_tokens_k=2, max_tokens=1)
    assert isinstance(rated.target_prompt_logprobs, np.ndarray)
    assert (rated.target_prompt_logprobs[:, 0] == 0).all()
    assert np.allclose(rated.target_prompt_logprobs[:, 1], whole.topk_prompt.logprobs[1:, 0], atol=1e-5)
    assert rated.prompt_alt_tokens
    assert rated.prompt_alt_tokens[0].shape == (count - 1, 2)
    assert rated.prompt_logprobs is None


def test_a_large_request_of_one_project_does_not_hold_up_another(desk: Desk) -> None:
    large = desk.ask(num_samples=64, project="a", with_stops=False, max_tokens=8)
    small = desk.ask(num_samples=1, project="b", with_stops=False, max_tokens=8)
    desk.run()
    assert desk.order.index(small) < desk.order.index(large)
    assert len(read_sample_output(desk.told[large].body).sequences) == 64


def test_what_is_cancelled_is_not_told(desk: Desk) -> None:
    number = desk.ask(num_samples=3, with_stops=False)
    desk.streams.work()
    desk.sampling.cancel(number, desk.hear)
    desk.run()
    assert number not in desk.told


def test_refusals_name_the_field(desk: Desk) -> None:
    room = desk.prompter.room
    wrong: dict[str, dict[str, Any]] = {
        "prompt": {"prompt": [10**6]},
        "sampling_params.max_tokens": {"max_tokens": room},
        "sampling_params.temperature": {"temperature": -1.0},
        "num_samples": {"num_samples": 10**6},
        "topk_sample_logprobs": {"topk_sample_logprobs": 1024, "num_samples": 1024, "max_tokens": 100},
        "prompt_alt_tokens_k": {"prompt_alt_tokens_k": 1025},
        "target_prompt_logprobs": {"body": write_tensor(np.ones((1, 1), np.int64))},
    }
    asked = {where: desk.ask(**facts) for where, facts in wrong.items()}
    missing = desk.ask(adapter="/nowhere")
    wide = desk.ask(prompt=[5, 6], body=write_tensor(np.ones((1, 10**5), np.int64)))
    desk.run()
    assert "names 100,000 tokens" in desk.told[wide].error["message"]  # type: ignore[index]
    for where, number in asked.items():
        error = desk.told[number].error
        assert error
        assert error["where"] == where
    assert desk.told[missing].error
