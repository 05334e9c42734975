"""What one key may do at a time: requests, files being sent, and open streams. Used from the event loop only."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.server.problems import problem

if TYPE_CHECKING:
    from luthier.errors import LuthierError
    from luthier.jobs.keys import Key
    from luthier.server.settings import Limits

_MOST_BUCKETS = 10_000


@dataclass
class _Bucket:
    """Requests that a key has left, and when that was counted."""

    left: float
    at: float


class Traffic:
    """Counts by key, and refuses with 429 and the seconds to wait."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._buckets: dict[str, _Bucket] = {}
        self._uploads: Counter[str] = Counter()
        self._streams: Counter[str] = Counter()

    def admit(self, key: Key) -> None:
        """Count one request of the key; refuse it where they come too fast."""
        rate, most, now = self._limits.requests_per_second, self._limits.requests_at_once, self._clock()
        bucket = self._buckets.get(key.id)
        if bucket is None:
            if len(self._buckets) >= _MOST_BUCKETS:
                self._buckets.clear()
            bucket = self._buckets[key.id] = _Bucket(float(most), now)
        bucket.left = min(float(most), bucket.left + (now - bucket.at) * rate)
        bucket.at = now
        if bucket.left < 1:
            wait = (1 - bucket.left) / rate if rate else 60
            raise _too_many(f"more than {rate:g} requests a second with this key", wait)
        bucket.left -= 1

    @contextmanager
    def uploading(self, key: Key) -> Iterator[None]:
        """While a file is being sent."""
        if self._uploads[key.id] >= self._limits.uploads:
            raise _too_many(f"{self._limits.uploads} files are being sent with this key already", 5)
        with _counted(self._uploads, key.id):
            yield

    def check_stream(self, key: Key) -> None:
        """Refuse another stream of events where the key has as many as it may."""
        if self._streams[key.id] >= self._limits.streams:
            raise _too_many(f"{self._limits.streams} streams are open with this key already", 5)

    @contextmanager
    def streaming(self, key: Key) -> Iterator[None]:
        """While a stream of events is open; `check_stream` came before its answer began."""
        with _counted(self._streams, key.id):
            yield


@contextmanager
def _counted(counts: Counter[str], name: str) -> Iterator[None]:
    counts[name] += 1
    try:
        yield
    finally:
        counts[name] -= 1
        if not counts[name]:
            del counts[name]


def _too_many(message: str, seconds: float) -> LuthierError:
    error = problem(429, message, code="quota_exceeded", hint="wait for as long as the header Retry-After says")
    vars(error)["retry_after"] = max(1, math.ceil(seconds))
    return error
