"""Waiting is never silent, and errors of the SDK become ours."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from enum import Enum
from typing import Any

import pytest

from luthier.engines.tinker import waiting
from luthier.engines.tinker.address import Service
from luthier.engines.tinker.waiting import Queue, translate, wait
from luthier.errors import ServerError, ServerGoneError
from luthier.runs import events

SERVICE = Service("http://127.0.0.1:9", "tml-key")


class State(Enum):
    """As the SDK has it."""

    ACTIVE = "active"
    PAUSED = "paused_capacity"


class Late:
    """A future of the SDK."""

    def __init__(self) -> None:
        self.inner: Future[Any] = Future()

    def result(self, timeout: float | None = None) -> Any:
        return self.inner.result(timeout)

    def future(self) -> Future[Any]:
        return self.inner


def test_what_is_waited_for_is_told_with_the_state_of_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "FIRST_SECONDS", 0.01)
    monkeypatch.setattr(waiting, "EVERY_SECONDS", 0.01)
    told: list[events.Event] = []
    late, queue = Late(), Queue(told.append)
    queue.on_queue_state_change(State.PAUSED, "too many models")

    def hear(event: events.Event) -> None:
        told.append(event)
        if len(told) == 4:
            late.inner.set_result("here")

    assert wait(late, "step 3", SERVICE, queue, hear) == "here"
    assert all(isinstance(event, events.Waiting) for event in told)
    assert (told[0].state, told[0].reason) == ("paused_capacity", "too many models")  # type: ignore[attr-defined]
    assert {(event.what, event.state) for event in told[1:]} == {("step 3", "paused_capacity")}  # type: ignore[attr-defined]


def test_a_service_that_went_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_SECONDS", "EVERY_SECONDS", "_ASKED_AFTER_SECONDS"):
        monkeypatch.setattr(waiting, name, 0.0)
    late, told = Late(), threading.Event()

    def hear(event: Any) -> None:
        if event.state == "unreachable":
            told.set()
            late.inner.set_result(None)

    wait(late, "a step", SERVICE, Queue(None), hear)
    assert told.is_set()


def test_a_queue_tells_of_changes_alone() -> None:
    told: list[events.Event] = []
    queue = Queue(told.append)
    for state in (State.ACTIVE, State.ACTIVE, State.PAUSED, State.PAUSED, State.ACTIVE):
        queue.on_queue_state_change(state, None)
    assert [event.state for event in told] == ["paused_capacity", "active"]  # type: ignore[attr-defined]


def test_errors_of_the_sdk_are_ours() -> None:
    tinker = pytest.importorskip("tinker")
    httpx = pytest.importorskip("httpx")
    from tinker.types import RequestErrorCategory

    request = httpx.Request("POST", "http://127.0.0.1:9/api/v1/asample")
    said = "Request failed: rank: too large for self.request_id='f1' and expected type self.model_cls=int"
    failed = tinker.RequestFailedError(said, request_id="f1", category=RequestErrorCategory.User)
    found = translate(failed, "creating", SERVICE)
    assert isinstance(found, ServerError)
    assert found.message == "creating: the service could not do it (user): rank: too large"
    gone = translate(tinker.APIConnectionError(request), "saving", SERVICE)
    assert isinstance(gone, ServerGoneError)
    answer = httpx.Response(401, text='{"detail": "no such key"}', request=request)
    refused = translate(tinker.AuthenticationError("401", response=answer, body=None), "saving", SERVICE)
    assert isinstance(refused, ServerError)
    assert (refused.status, "no such key" in refused.message) == (401, True)
    assert translate(refused, "again", SERVICE) is refused
    other = translate(RuntimeError("poisoned\nand more"), "a step", SERVICE)
    assert other.message == "a step: RuntimeError: poisoned"
