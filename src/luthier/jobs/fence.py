"""The trainer's own guard: it stops when its lease is not renewed, or when it is asked to, whatever else it does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from luthier.jobs.attempt import boot_id, read_lease, read_stop, running_seconds
from luthier.jobs.job import Timings
from luthier.jobs.processes import end_own_session

_LOOKS_PER_HEARTBEAT = 4


class Fence:
    """Looks at the attempt's folder several times a heartbeat. As a context it does so in a thread of its own.

    Its lease old by `fence` seconds, the process is asked to stop by a SIGTERM of its own; by `kill` seconds, it and
    all that it started are killed. A timer of the system kills it should this thread not come to run.
    """

    def __init__(
        self,
        folder: Path,
        timings: Timings,
        *,
        clock: Callable[[], float] = running_seconds,
        kill: Callable[[], None] = end_own_session,
    ) -> None:
        self._reason: str | None = None
        self._folder, self._timings, self._clock, self._kill = folder, timings, clock, kill
        self._boot = boot_id()
        self._renewals: int | None = None
        self._renewed = clock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fence", daemon=True)

    @property
    def reason(self) -> str | None:
        """Why it was asked to stop: `pause`, `cancel`, or `lost` for a lease that is gone."""
        return read_stop(self._folder) or self._reason

    def __enter__(self) -> Fence:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _watch(self) -> None:
        while not self._is_over.wait(self._timings.heartbeat / _LOOKS_PER_HEARTBEAT):
            self.look()

    def look(self) -> None:
        """Once: at the lease and at what is asked."""
        age = self._age()
        if age >= self._timings.kill:
            self._kill()
        # The system's own timer needs nothing of Python; it comes a little after this thread would.
        left = self._timings.kill - age + self._timings.heartbeat
        signal.setitimer(signal.ITIMER_REAL, max(left, 0.001))
        if age >= self._timings.fence:
            self._reason = "lost"
        if self.reason:
            os.kill(os.getpid(), signal.SIGTERM)  # again at each look, in case nothing listened before

    def _age(self) -> float:
        """Seconds since the database was last asked with success, as far as can be told from here."""
        lease = read_lease(self._folder)
        if lease is not None and lease.boot and lease.boot == self._boot:
            self._renewed = max(self._renewed, lease.at)
        elif lease is not None and lease.renewals != self._renewals:
            self._renewals, self._renewed = lease.renewals, self._clock()
        return self._clock() - self._renewed
