"""Gives up attempts whose worker is gone. It trusts no clock but its own, and only while it watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from luthier.jobs.job import Attempt, Timings
from luthier.jobs.queue import Queue

K = TypeVar("K")


@dataclass
class _Watched:
    """A counter, and for how many seconds it was seen to stand still."""

    count: int
    still: float = 0.0


class Reaper:
    """Call `look` about once a heartbeat. What stands still for `timings.takeover` seconds of its watching is given up.

    A stretch in which nobody looked (this machine slept, the database was away) counts as one heartbeat at most: the
    workers may have been kept from renewing by the very same.
    """

    def __init__(
        self, queue: Queue, timings: Timings | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._queue = queue
        self._timings = timings or Timings()
        self._clock = clock
        self._looked_at: float | None = None
        self._attempts: dict[tuple[str, int], _Watched] = {}
        self._workers: dict[str, _Watched] = {}

    @property
    def seconds_since_look(self) -> float | None:
        """How long ago it looked and could; None before the first time. A server that is ready has looked lately."""
        return None if self._looked_at is None else self._clock() - self._looked_at

    def look(self) -> list[Attempt]:
        """Look once; the attempts that were given up, whose jobs wait again."""
        held = {(each.job, each.number): each for each in self._queue.held()}
        beats = {each.id: each.beats for each in self._queue.list_workers()}
        passed = self._pass_time()
        for worker in self._stand_still(self._workers, beats, passed):
            self._queue.forget_worker(worker, beats[worker])
        renewals = {key: each.renewals for key, each in held.items()}
        silent = self._stand_still(self._attempts, renewals, passed)
        return [held[key] for key in silent if self._give_up(held[key])]

    def _pass_time(self) -> float:
        now = self._clock()
        passed = 0.0 if self._looked_at is None else now - self._looked_at
        self._looked_at = now
        return min(passed, 2 * self._timings.heartbeat)

    def _stand_still(self, watched: dict[K, _Watched], counts: Mapping[K, int], passed: float) -> list[K]:
        """Remember the counts, and name those that have stood still for too long."""
        for key in set(watched) - set(counts):
            del watched[key]
        for key, count in counts.items():
            if key in watched and watched[key].count == count:
                watched[key].still += passed
            else:
                watched[key] = _Watched(count)
        return [key for key in counts if watched[key].still >= self._timings.takeover]

    def _give_up(self, attempt: Attempt) -> bool:
        seconds = self._timings.takeover
        return self._queue.lose(attempt, f"worker `{attempt.worker}` did not renew its lease for {seconds:g} s")
