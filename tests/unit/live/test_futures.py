"""Whoever waits for a result waits for an event, never longer than asked, and no result is kept for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from luthier.errors import CallError, LuthierError, NonFiniteError, NotFoundError, UnsupportedError
from luthier.live import futures
from luthier.live.futures import Outcome, Promise, Promises, QueueState, failed


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def new(promises: Promises, request: str = "r", project: str = "mine") -> Promise:
    return promises.add(Promise(request, project, "json"))


def test_all_who_wait_hear_at_once_and_a_second_ending_is_not_heard() -> None:
    async def act() -> None:
        promises = Promises()
        promise = new(promises)
        waiting = [asyncio.create_task(promises.wait(promise)) for _ in range(3)]
        await asyncio.sleep(0)
        promise.resolve(Outcome({"a": 1}))
        promise.resolve(Outcome({"a": 2}))
        assert [(await each).answer for each in waiting] == [{"a": 1}] * 3
        assert not promise._waiting

    run(act())


def test_who_waits_too_long_hears_nothing_and_leaves_nothing_behind() -> None:
    async def act() -> None:
        promises = Promises()
        promise = new(promises)
        assert await promises.wait(promise, 0.01) is None
        assert not promise._waiting

    run(act())


def test_a_server_that_ends_lets_everybody_go() -> None:
    async def act() -> None:
        promises = Promises()
        promise = new(promises)
        waiting = asyncio.create_task(promises.wait(promise))
        await asyncio.sleep(0)
        promises.drain()
        assert await waiting is None
        assert await promises.wait(promise) is None, "and nobody waits again"

    run(act())


def test_a_promise_is_its_projects_alone() -> None:
    promises = Promises()
    promise = new(promises)
    assert promises.find("mine", "r") is promise
    assert promises.find("other", "r") is None


def test_what_was_retired_is_forgotten_in_time_and_sooner_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    promises = Promises(keep_seconds=10, clock=lambda: now)
    first, second = new(promises, "first"), new(promises, "second")
    promises.retire(first)
    now = 11.0
    promises.retire(second)
    assert promises.find("mine", "first") is None
    assert promises.find("mine", "second") is second
    monkeypatch.setattr(futures, "_KEPT_BYTES", 4000)
    large = new(promises, "large")
    large.resolve(Outcome({}, b"x" * 3000))
    promises.retire(large)
    assert promises.find("mine", "second") is None
    assert promises.find("mine", "large") is large


@pytest.mark.parametrize(
    ("error", "category"),
    [
        (CallError("wrong"), "user"),
        (UnsupportedError("not here"), "user"),
        (NotFoundError("gone"), "user"),
        (NonFiniteError("nan"), "user"),
        (LuthierError("ours"), "server"),
    ],
)
def test_whose_fault_it_was(error: LuthierError, category: str) -> None:
    assert failed(error).answer == {"error": error.message, "category": category}


def test_what_a_request_waits_for_is_told() -> None:
    assert Promise("r", "p", "json").queue_state == QueueState("active", None)
    told = Promise("r", "p", "json", lambda: QueueState("active", "waiting for seq_id 4"))
    assert told.queue_state.reason == "waiting for seq_id 4"
