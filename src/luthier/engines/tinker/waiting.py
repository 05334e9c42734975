"""Waiting for what a service is asked: never silently, and never longer than it is there."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from luthier.engines.tinker.address import Service, answers, refusal, told_by
from luthier.errors import LuthierError, ServerError, ServerGoneError
from luthier.runs import events

Watch = Callable[[events.Event], None]
Found = TypeVar("Found")

FIRST_SECONDS = 2.0
EVERY_SECONDS = 10.0
_ASKED_AFTER_SECONDS = 20.0
_ACTIVE = "active"
_GONE = "unreachable"
# Of a failed request the SDK tells its own id and the class that it expected behind what the service said.
_SDKS_OWN = re.compile(r"^Request failed: | for self\.request_id=.*$", re.S)


class Queue:
    """How the service says it stands: the SDK tells it of each change, and it goes on to the run's events."""

    def __init__(self, watch: Watch | None) -> None:
        self.state, self.reason = "", ""
        self._watch = watch
        self._lock = threading.Lock()

    def on_queue_state_change(self, queue_state: Any, queue_state_reason: str | None) -> None:
        """Called by the SDK in its own thread."""
        state, reason = str(getattr(queue_state, "value", queue_state)), queue_state_reason or ""
        with self._lock:
            was, self.state, self.reason = self.state, state, reason
        if state != was and self._watch and (state != _ACTIVE or was not in ("", _ACTIVE)):
            self._watch(events.Waiting("the service", 0.0, state, reason))


def wait(future: Any, what: str, service: Service, queue: Queue, watch: Watch | None) -> Any:
    """The result of a future of the SDK; while it is not there, an event tells what is waited for and how long."""
    started = time.monotonic()
    patience = FIRST_SECONDS
    while True:
        try:
            return future.result(timeout=patience)
        except TimeoutError:
            if future.future().done():
                raise
            patience = EVERY_SECONDS
            seconds = time.monotonic() - started
            state, reason = queue.state, queue.reason
            if seconds > _ASKED_AFTER_SECONDS and not answers(service):
                state, reason = _GONE, "it does not answer; the SDK goes on asking"
            if watch:
                watch(events.Waiting(what, seconds, state, reason))
        except Exception as error:  # the SDK's errors are of many classes, none of which people know
            raise translate(error, what, service) from None


def translate(error: Exception, what: str, service: Service) -> LuthierError:
    """An error of the SDK as one of ours."""
    if isinstance(error, LuthierError):
        return error
    said = (str(error).strip() or type(error).__name__).removesuffix(".")
    names = {each.__name__ for each in type(error).__mro__}
    if "RequestFailedError" in names:
        category = str(getattr(getattr(error, "category", None), "value", "unknown"))
        told = _SDKS_OWN.sub("", said)
        hint = "`luthier tinker inspect` shows what the service supports"
        if category != "user":
            hint = "the service's own failure; `luthier resume RUN` goes on from the last checkpoint"
        failed = ServerError(f"{what}: the service could not do it ({category}): {told}", hint=hint)
        failed.status = 400 if category == "user" else 500
        return failed
    if (status := getattr(error, "status_code", None)) is not None:
        body = getattr(getattr(error, "response", None), "text", "")
        return refusal(service, int(status), f"{what}: {told_by(body) or said}")
    if "APIConnectionError" in names:
        return ServerGoneError(
            f"{what}: {service.url} stopped answering: {said}",
            hint="`luthier resume RUN` goes on from the last checkpoint once it is back",
        )
    return ServerError(
        f"{what}: {type(error).__name__}: {said.splitlines()[0][:600]}",
        hint="`luthier resume RUN` goes on from the last checkpoint; `luthier tinker inspect` shows what it supports",
    )
