"""The trainer's own guard: when it asks to stop, when it kills, and what counts as a renewed lease."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from luthier.jobs.attempt import LEASE, Lease, write_lease, write_stop
from luthier.jobs.fence import Fence
from luthier.jobs.job import Timings
from luthier.training.signals import StopFlag

TIMINGS = Timings()


class Guarded:
    """A fence with a clock of the test's own, which only notes that it would kill."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.time, self.kills = folder, 1000.0, 0
        self.fence = Fence(folder, TIMINGS, clock=lambda: self.time, kill=self._kill)

    def _kill(self) -> None:
        self.kills += 1

    def look(self, after: float = 0.0) -> str | None:
        self.time += after
        self.fence.look()
        return self.fence.reason


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    with StopFlag():
        yield Guarded(tmp_path)
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_a_renewed_lease_keeps_it_going(guarded: Guarded) -> None:
    for number in range(20):
        write_lease(guarded.folder, number, guarded.time)
        assert guarded.look(after=TIMINGS.heartbeat) is None
    assert guarded.kills == 0


def test_without_a_lease_it_stops_and_then_kills(guarded: Guarded) -> None:
    with StopFlag() as stop:
        assert guarded.look(after=TIMINGS.fence - 0.1) is None
        assert not stop
        assert guarded.look(after=0.2) == "lost"
        assert stop.reason == "SIGTERM"
        assert guarded.kills == 0
        guarded.look(after=TIMINGS.kill - TIMINGS.fence)
        assert guarded.kills == 1


def test_a_lease_counts_from_when_the_database_was_asked(guarded: Guarded) -> None:
    """A worker that slept between the answer and the file makes no old answer new."""
    asked_at = guarded.time
    guarded.time += TIMINGS.fence + 1
    write_lease(guarded.folder, 7, asked_at)
    assert guarded.look() == "lost"


def test_a_lease_of_another_machine_counts_from_when_it_was_seen(guarded: Guarded) -> None:
    guarded.time += TIMINGS.fence - 1
    (guarded.folder / LEASE).write_bytes(orjson.dumps(vars(Lease(1, "another boot", 5.0))))
    assert guarded.look() is None
    assert guarded.look(after=TIMINGS.fence - 1) is None
    assert guarded.look(after=2) == "lost"  # it is the same lease still


def test_a_lease_that_came_back_does_not_take_the_stop_back(guarded: Guarded) -> None:
    assert guarded.look(after=TIMINGS.fence) == "lost"
    write_lease(guarded.folder, 1, guarded.time)
    assert guarded.look() == "lost"


@pytest.mark.parametrize("word", ["pause", "cancel"])
def test_a_word_in_the_folder_stops_it(guarded: Guarded, word: str) -> None:
    with StopFlag() as stop:
        write_lease(guarded.folder, 1, guarded.time)
        assert guarded.look() is None
        write_stop(guarded.folder, word)
        assert guarded.look() == word
        assert stop


def test_the_system_kills_a_process_whose_guard_does_not_come_to_run(tmp_path: Path) -> None:
    timings = replace(TIMINGS.scaled(0.01), heartbeat=0.1)
    code = (
        "import sys, time; from pathlib import Path; from luthier.jobs.fence import Fence; "
        "from luthier.jobs.job import Timings\n"
        f"Fence(Path(sys.argv[1]), Timings(**{vars(timings)!r})).look()\n"
        "time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], timeout=30, check=False, env=dict(os.environ))
    assert done.returncode == -signal.SIGALRM
