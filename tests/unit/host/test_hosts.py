"""Host processes: started when asked, shared by adapters, stopped with the server, started again when they died."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import HostError, LuthierError
from luthier.host.ask import Ask, Said
from luthier.host.hosts import Hosts
from luthier.host.place import Place, find_place
from luthier.runs.resolve import find_resolved
from tests.unit.adapters.runs import finished_run

pytestmark = pytest.mark.torch
COPY = {"role": "user", "content": "Copy: hello world"}


def ask(**changes: Any) -> Ask:
    return Ask(**{"messages": [COPY], "temperature": 0.0, "max_tokens": 40, **changes})


async def hear(hosts: Hosts, place: Place, asked: Ask) -> list[Said]:
    return [said async for said in hosts.answer(place, asked)]


def with_hosts(home: Path, work: Any, **options: Any) -> Any:
    async def inner() -> Any:
        hosts = Hosts(home, **options)
        try:
            return await work(hosts)
        finally:
            await hosts.close()

    body: Coroutine[Any, Any, Any] = inner()
    return asyncio.run(body)


def test_many_ask_one_process(own_home: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    base, tuned = find_place(find_resolved("practice")), find_place(find_resolved(str(run.folder)))
    assert base.base == tuned.base
    assert tuned.adapter

    async def work(hosts: Hosts) -> None:
        found = await asyncio.gather(
            *(hear(hosts, base, ask()) for _ in range(3)),
            hear(hosts, base, ask(max_tokens=2)),
            hear(hosts, tuned, ask(adapter=tuned.adapter, likeliest=2)),
        )
        assert hosts.list_bases() == [base]
        whole = ["".join(said.text for said in parts) for parts in found]
        assert whole[0] == whole[1] == whole[2]
        assert found[0][0].prompt_tokens == found[4][0].prompt_tokens > 0
        assert found[0][-1].finish == "stop"
        assert found[3][-1].finish == "length"
        assert found[3][-1].answer_tokens == 2
        assert all(len(token.likeliest) == 2 for said in found[4] for token in said.tokens)
        with pytest.raises(LuthierError, match="the model holds"):
            await hear(hosts, base, ask(max_tokens=100_000))
        with pytest.raises(LuthierError, match="role"):
            await hear(hosts, base, ask(messages=[{"role": "wizard", "content": "x"}]))
        await check_restart(hosts, base)

    with_hosts(own_home, work)


async def check_restart(hosts: Hosts, base: Place) -> None:
    """A host that was killed is an error for those it answered, and is there again for the next."""
    process = hosts._hosts[base].process
    answer = hosts.answer(base, ask(messages=[{"role": "user", "content": "Tell a story."}], max_tokens=4000))
    await anext(answer)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(HostError):
        async for _ in answer:
            pass
    await process.wait()
    assert (await hear(hosts, base, ask()))[-1].finish == "stop"


def test_a_start_that_nobody_waits_for_leaves_no_process(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[asyncio.subprocess.Process] = []
    start = asyncio.create_subprocess_exec

    async def start_heard(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        started.append(await start(*arguments, **options))
        has_started.set()
        return started[-1]

    async def work(hosts: Hosts) -> None:
        asked = asyncio.create_task(hosts.bench(Place("practice")))
        await has_started.wait()
        asked.cancel()
        await asyncio.wait({asked})
        assert asked.cancelled()
        assert [process.returncode for process in started] == [-signal.SIGKILL]

    has_started = asyncio.Event()
    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_heard)
    with_hosts(own_home, work)


def test_a_model_that_cannot_be_loaded_is_told(own_home: Path, tmp_path: Path) -> None:
    async def work(hosts: Hosts) -> None:
        with pytest.raises(LuthierError, match="no model at"):
            await hear(hosts, Place(str(tmp_path / "nothing")), ask())

    with_hosts(own_home, work)


def test_an_idle_host_ends_and_so_does_one_whose_server_is_gone(own_home: Path) -> None:
    base = find_place(find_resolved("practice"))

    async def work(hosts: Hosts) -> None:
        await hear(hosts, base, ask())
        process = hosts._hosts[base].process
        await asyncio.wait_for(process.wait(), 30)
        assert hosts.list_bases() == []

    with_hosts(own_home, work, idle_seconds=0.2)


def test_no_secret_reaches_a_host(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("LUTHIER_DATABASE", "postgresql://u:canary@h/d")
    hosts = Hosts(own_home)
    assert "canary" not in str(hosts._environment())
