"""Results that are on their way: who asks for one waits for an event, half a minute at most, and then asks again."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier.errors import LuthierError

LONGEST_WAIT_SECONDS = 30.0
_USER_CODES = frozenset(
    {"call_invalid", "conflict", "data_invalid", "model_invalid", "non_finite_loss", "not_found", "unsupported"}
)
_KEPT_BYTES = 256 << 20
_SMALL_BYTES = 512


@dataclass(frozen=True)
class Outcome:
    """How a request ended: a JSON answer, a protobuf body, or what failed and whose fault that was."""

    answer: Mapping[str, Any] = field(default_factory=dict)
    body: bytes | None = None
    is_failure: bool = False


@dataclass(frozen=True)
class QueueState:
    """What a request waits for: `active`, `paused_capacity` or `paused_rate_limit`, and why."""

    state: str = "active"
    reason: str | None = None


def failed(error: LuthierError) -> Outcome:
    """The outcome of work that raised; what the request itself asked wrongly is the user's."""
    message = f"{error.message}; {error.hint}" if error.hint else error.message
    category = "user" if error.code in _USER_CODES else "server"
    return Outcome({"error": message, "category": category}, is_failure=True)


class Promise:
    """One request, from the moment it was taken in until nobody asks for it any more."""

    def __init__(self, request: str, project: str, shape: str, tell: Callable[[], QueueState] | None = None) -> None:
        self.request, self.project, self.shape = request, project, shape
        self.outcome: Outcome | None = None
        self.state = QueueState()
        self._tell = tell
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def queue_state(self) -> QueueState:
        """What it waits for now."""
        return self._tell() if self._tell else self.state

    def resolve(self, outcome: Outcome) -> None:
        """It has ended; whoever waits hears of it. A second ending is not heard."""
        if self.outcome is None:
            self.outcome = outcome
            self.wake()

    def wake(self) -> None:
        """Let whoever waits look again."""
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    async def wait(self, seconds: float) -> Outcome | None:
        """The outcome, or None where it is not there in time."""
        if self.outcome is None and seconds > 0:
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.add(waiting)
            try:
                await asyncio.wait({waiting}, timeout=seconds)
            finally:
                self._waiting.discard(waiting)
        return self.outcome


class Promises:
    """Promises by request id. All methods belong to one event loop."""

    def __init__(self, *, keep_seconds: float = 3600.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._keep_seconds, self._clock = keep_seconds, clock
        self._known: dict[str, Promise] = {}
        self._retired: deque[tuple[float, Promise]] = deque()
        self._bytes = 0
        self._is_draining = False

    def __len__(self) -> int:
        return len(self._known)

    def add(self, promise: Promise) -> Promise:
        """Know it from now on."""
        self._known[promise.request] = promise
        return promise

    def find(self, project: str, request: str) -> Promise | None:
        """The promise, if this project made it."""
        found = self._known.get(request)
        return found if found and found.project == project else None

    def retire(self, promise: Promise, *, keep_seconds: float | None = None) -> None:
        """It has ended and may be forgotten after a while, sooner where memory is short."""
        keep = self._keep_seconds if keep_seconds is None else keep_seconds
        self._retired.append((self._clock() + keep, promise))
        self._bytes += _size(promise)
        while self._retired and (self._retired[0][0] <= self._clock() or self._bytes > _KEPT_BYTES):
            _, gone = self._retired.popleft()
            self._bytes -= _size(gone)
            self._known.pop(gone.request, None)

    async def wait(self, promise: Promise, seconds: float = LONGEST_WAIT_SECONDS) -> Outcome | None:
        """The outcome, or None: not there in time, or the server is about to end."""
        return await promise.wait(0 if self._is_draining else min(seconds, LONGEST_WAIT_SECONDS))

    def drain(self) -> None:
        """Nobody waits any longer: the server ends."""
        self._is_draining = True
        for promise in self._known.values():
            promise.wake()


def _size(promise: Promise) -> int:
    body = promise.outcome.body if promise.outcome else None
    return _SMALL_BYTES + len(body or b"")
