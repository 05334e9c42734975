"""Samples: asked for once, told once, given up when nobody waits, and asked again where a process died."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from luthier.errors import NotFoundError, QuotaError
from luthier.live.futures import Outcome, Promise
from luthier.live.rows import NewSession, Sampler
from luthier.live.sampling import Samplers, Wanted, fingerprint_of
from luthier.live.store import LiveStore
from tests.service.tinker.abacus import Hall, Server


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 30))


async def new_sampler(server: Server, samplers: Samplers) -> Sampler:
    session = server.house.store.create_session("default", NewSession())
    return await samplers.create("default", session.id, 0, base="practice", model_path=None)


def wanted(sampler: Sampler, seq: int, seed: int = 5) -> Wanted:
    return Wanted(sampler, seq, {"seed": seed}, 2, fingerprint_of(str(seed).encode()))


async def told(server: Server, promise: Promise) -> Any:
    outcome = await server.house.promises.wait(promise, 10)
    assert outcome
    return outcome.answer if outcome.is_failure else int(outcome.body or b"")


async def let(hall: Hall) -> None:
    """Have the process that stands now answer."""
    while not hall.started:
        await asyncio.sleep(0)
    hall.now.may_answer.set()


def test_a_request_that_comes_again_finds_the_same_samples(store: LiveStore) -> None:
    async def act() -> None:
        async with Server(store) as server:
            samplers = Samplers(server.house)
            sampler = await new_sampler(server, samplers)
            first, names = await samplers.ask(wanted(sampler, 1))
            again, same = await samplers.ask(wanted(sampler, 1))
            assert (again, same) == (first, names)
            assert len(set(names)) == 2
            other, _ = await samplers.ask(wanted(sampler, 1, seed=6))
            assert other is not first, "another request under the same number is another request"
            await let(server.hall)
            assert [await told(server, each) for each in (first, other)] == [5, 6]

    run(act())


def test_what_is_given_up_ends_and_leaves_room(store: LiveStore) -> None:
    async def act() -> None:
        async with Server(store, most_samples=1) as server:
            samplers = Samplers(server.house)
            sampler = await new_sampler(server, samplers)
            promise, _ = await samplers.ask(wanted(sampler, 1))
            with pytest.raises(QuotaError):
                await samplers.ask(wanted(sampler, 2))
            samplers.cancel("other", promise.request)
            assert promise.outcome is None
            samplers.cancel("default", promise.request)
            assert "cancelled" in (await told(server, promise))["error"]
            await samplers.ask(wanted(sampler, 2))
            samplers.close()

    run(act())


def test_a_process_that_dies_is_asked_again_and_one_that_always_dies_is_told_of(store: LiveStore) -> None:
    async def act() -> None:
        async with Server(store) as server:
            samplers = Samplers(server.house)
            sampler = await new_sampler(server, samplers)
            promise, _ = await samplers.ask(wanted(sampler, 1))
            await let(server.hall)
            server.hall.now.die()
            while len(server.hall.started) < 2:
                await asyncio.sleep(0)
            await let(server.hall)
            assert await told(server, promise) == 5
            server.hall.before = lambda kind, body: server.hall.now.die()
            promise, _ = await samplers.ask(wanted(sampler, 2))
            assert (await told(server, promise))["category"] == "server"

    run(act())


def test_what_ended_is_told_behind_a_cursor_and_client_by_client(store: LiveStore) -> None:
    async def act() -> None:
        async with Server(store) as server:
            samplers = Samplers(server.house)
            sampler = await new_sampler(server, samplers)
            assert [samplers.join(sampler) for _ in range(2)] == [1, 2]
            reading = asyncio.create_task(samplers.read_feed(sampler, 0, 0, 10))
            first, _ = await samplers.ask(wanted(sampler, 1))
            await let(server.hall)
            completions, cursor = await reading
            assert completions == [
                {"state": "finished", "request_id": first.request, "response_payload_uncompressed_size": 1}
            ]
            second, _ = await samplers.ask(wanted(sampler, 2))
            await samplers.ask(wanted(sampler, 1_000_000_007))
            await told(server, second)
            later, _ = await samplers.read_feed(sampler, 0, cursor, 0)
            assert [each["request_id"] for each in later] == [second.request]
            assert len((await samplers.read_feed(sampler, 1, 0, 0))[0]) == 1
            samplers.drain()
            assert (await samplers.read_feed(sampler, 5, 0, 10))[0] == []

    run(act())


def test_a_feed_that_nobody_reads_stays_small_and_is_forgotten(
    store: LiveStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that comes back later is told of all that ended since, whatever its cursor was."""
    monkeypatch.setattr("luthier.live.sampling._MOST_TOLD", 2)
    monkeypatch.setattr("luthier.live.sampling._KEEP_SECONDS", 0.0)

    async def act() -> None:
        async with Server(store) as server:
            samplers = Samplers(server.house)
            sampler = await new_sampler(server, samplers)
            ended = [_ended(name) for name in "abc"]
            for each in ended:
                samplers._feed_of((sampler.id, 0)).add(each)
            newest, cursor = await samplers.read_feed(sampler, 0, 0, 0)
            assert [each["request_id"] for each in newest] == ["b", "c"]
            promise, _ = await samplers.ask(wanted(sampler, 1))
            await let(server.hall)
            await told(server, promise)
            while samplers._feeds:
                await asyncio.sleep(0)
            assert not samplers._asked
            await asyncio.sleep(0.005)
            samplers._feed_of((sampler.id, 0)).add(ended[0])
            assert len((await samplers.read_feed(sampler, 0, cursor, 0))[0]) == 1

    run(act())


def _ended(name: str) -> Promise:
    promise = Promise(name, "default", "sample")
    promise.resolve(Outcome({}, b"x"))
    return promise


def test_a_sampler_is_its_projects_alone_and_its_number_holds_one(store: LiveStore) -> None:
    async def act() -> None:
        async with Server(store) as server:
            samplers = Samplers(server.house)
            sampler = await new_sampler(server, samplers)
            assert await samplers.find("default", sampler.id) == sampler
            with pytest.raises(NotFoundError):
                await samplers.find("other", sampler.id)
            with pytest.raises(NotFoundError):
                await samplers.create("other", sampler.session, 1, base="practice", model_path=None)
            again = await samplers.create("default", sampler.session, 0, base="practice", model_path=None)
            assert again.id == sampler.id

    run(act())
