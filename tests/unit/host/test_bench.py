"""One process trains, samples and chats at once over one base; its end is told to all who wait."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from luthier.errors import HostError, LuthierError
from luthier.host.ask import Ask
from luthier.host.bench import Bench
from luthier.host.datums import (
    Datum,
    LossRequest,
    SampleOutput,
    read_loss_output,
    read_sample_output,
    write_loss_request,
)
from luthier.host.hosts import Hosts
from luthier.host.place import Place

pytestmark = [pytest.mark.torch, pytest.mark.slow]
BASE = Place("practice")
PROMPT = list(range(40, 60))


def teach(model: str) -> bytes:
    """The prompt goes on with one token, always."""
    tokens = np.array([*PROMPT, *[7] * 8])
    weights = np.concatenate([np.zeros(len(PROMPT) - 1), np.ones(8)]).astype(np.float32)
    inputs = {"target_tokens": tokens[1:], "weights": weights}
    return write_loss_request(LossRequest(model, 1, (Datum(tokens[:-1], inputs),), "cross_entropy"))


async def train(bench: Bench, model: str, folder: Path, rank: int) -> float:
    """Until it is learnt; the adapter is saved."""
    layout = {"train_mlp": True, "train_attn": True, "train_unembed": True}
    await bench.do("open", model, rank=rank, seed=1, project=model, **layout)
    for _ in range(9):
        stepped = await asyncio.gather(
            bench.do("forward_backward", model, body=teach(model)), bench.do("optim_step", model, learning_rate=5e-3)
        )
    await bench.do("save", model, what="adapter", folder=str(folder))
    return read_loss_output(stepped[0].body).metrics["loss:sum"]


async def sample(bench: Bench, adapter: Path | None, **facts: Any) -> SampleOutput:
    wanted = {"prompt": PROMPT, "max_tokens": 5, "temperature": 0.0, "with_stops": False, **facts}
    done = await bench.do("sample", adapter=str(adapter) if adapter else None, **wanted)
    return read_sample_output(done.body)


async def chat(hosts: Hosts) -> str:
    asked = Ask([{"role": "user", "content": "Copy: hello world"}], temperature=0.0, max_tokens=40)
    return "".join([said.text async for said in hosts.answer(BASE, asked)])


async def work(hosts: Hosts, home: Path) -> None:
    bench = await hosts.bench(BASE)
    assert await hosts.bench(BASE) is bench
    before = await chat(hosts)
    losses, base, answer = await asyncio.gather(
        asyncio.gather(*(train(bench, f"m{rank}", home / f"m{rank}", rank) for rank in (2, 8))),
        asyncio.gather(*(sample(bench, None, num_samples=3) for _ in range(3))),
        chat(hosts),
    )
    assert answer == before
    assert max(losses) < 1
    assert base[0].sequences[0].tokens.tolist() != [7] * 5
    for rank in (2, 8):
        found = await sample(bench, home / f"m{rank}", prompt_logprobs=True)
        assert found.sequences[0].tokens.tolist() == [7] * 5
        assert found.sequences[0].stop_reason == "length"
        assert found.prompt_logprobs is not None
        assert np.isnan(found.prompt_logprobs).tolist() == [True] + [False] * 19
    refused = LossRequest("m2", 1, (Datum(np.array([1]), {"target_tokens": np.array([1])}),), "gspo")
    with pytest.raises(LuthierError, match="loss_fn"):
        await bench.do("forward_backward", "m2", body=write_loss_request(refused))
    await give_up(bench)
    await check_idle(hosts, bench)
    await check_end(hosts, bench)


async def give_up(bench: Bench) -> None:
    """A sample that nobody waits for makes room."""
    waiting = asyncio.create_task(sample(bench, None, max_tokens=200, temperature=1.0, num_samples=16))
    await sample(bench, None)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    assert (await sample(bench, None)).sequences[0].tokens.size == 5


async def check_idle(hosts: Hosts, bench: Bench) -> None:
    """A base with open models is kept, whoever else wants room."""
    with pytest.raises(HostError, match="at work"):
        await hosts.bench(Place("another"))
    assert bench.is_busy


async def check_end(hosts: Hosts, bench: Bench) -> None:
    process = hosts._hosts[BASE].process
    waiting = asyncio.create_task(sample(bench, None, max_tokens=400))
    await bench.do("forward_backward", "m2", body=teach("m2"))
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(HostError, match="ended"):
        await waiting
    with pytest.raises(HostError, match="ended"):
        await bench.do("optim_step", "m2")
    assert not bench.is_alive
    other = await hosts.bench(BASE)
    assert other is not bench
    with pytest.raises(LuthierError, match="no model `m2` is open"):
        await other.do("optim_step", "m2")


def test_one_process_for_all_that_a_base_is_asked(own_home: Path) -> None:
    async def inner() -> None:
        hosts = Hosts(own_home, most=1, precision="fp32")
        try:
            await work(hosts, own_home)
        finally:
            await hosts.close()

    asyncio.run(inner())
