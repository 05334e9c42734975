"""The one thread that computes: it asks its parts for the next piece of work, and the one served least comes first."""

from __future__ import annotations

import threading
import time
from typing import Protocol, TypeVar

Who = TypeVar("Who")


class Part(Protocol):
    """Somebody who has pieces of work; both methods are called by the thread alone."""

    def has_work(self) -> bool:
        """Whether there is anything to do now."""
        ...

    def work(self) -> None:
        """Do one piece; errors are told to whoever waits, and never raised."""
        ...


class Computing:
    """The thread, and who asked for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._parts: list[Part] = []
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="computing", daemon=True)

    def start(self, *parts: Part) -> None:
        """Begin to work for these."""
        self._parts = list(parts)
        self._thread.start()

    def wake(self) -> None:
        """Somebody has work now."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """End the thread after the piece that it computes."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        turns = Turns()
        while True:
            with self._changed:
                while not (ready := [part for part in self._parts if part.has_work()]) and not self._is_closed:
                    self._changed.wait()
                if self._is_closed:
                    return
            part = turns.choose(ready)
            began = time.perf_counter()
            part.work()
            turns.charge(part, time.perf_counter() - began)


class Turns:
    """Who comes next of those that are ready: the one that was given least, none of them for having waited longest."""

    def __init__(self) -> None:
        self._given: dict[object, float] = {}
        self._least = 0.0

    def choose(self, ready: list[Who]) -> Who:
        """The next one, the first of equals; one that was away has no more to catch up on than the others."""
        for each in ready:
            self._given[each] = max(self._given.get(each, 0.0), self._least)
        chosen = min(ready, key=lambda each: self._given[each])
        self._least = self._given[chosen]
        if len(self._given) > 4 * len(ready) + 64:
            self._given = {each: self._given[each] for each in ready}
        return chosen

    def charge(self, who: object, given: float) -> None:
        """It was given so much."""
        self._given[who] = self._given.get(who, self._least) + given
