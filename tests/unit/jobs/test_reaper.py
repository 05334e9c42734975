"""Leases end by standing still while somebody watches, and by nothing else."""

from __future__ import annotations

import pytest

from luthier.jobs.job import Claim, State, Timings, WorkerRow
from luthier.jobs.queue import Queue
from luthier.jobs.reaper import Reaper
from luthier.jobs.store import JobStore
from tests.unit.jobs.conftest import WORKER, Clock, make_queued, new_job

TIMINGS = Timings()


@pytest.fixture
def reaper(queue: Queue, clock: Clock) -> Reaper:
    return Reaper(queue, TIMINGS, clock=clock)


@pytest.fixture
def claim(store: JobStore, queue: Queue) -> Claim:
    make_queued(store, queue)
    found = queue.claim(WORKER)
    assert found is not None
    return found


def watch(reaper: Reaper, clock: Clock, seconds: float) -> int:
    """How many were given up in so many seconds of looking once a heartbeat."""
    given_up = 0
    for _ in range(int(seconds / TIMINGS.heartbeat)):
        clock.time += TIMINGS.heartbeat
        given_up += len(reaper.look())
    return given_up


def test_a_silent_attempt_is_given_up_after_the_takeover_time(
    reaper: Reaper, claim: Claim, store: JobStore, queue: Queue, clock: Clock
) -> None:
    reaper.look()
    assert watch(reaper, clock, TIMINGS.takeover - TIMINGS.heartbeat) == 0
    assert watch(reaper, clock, TIMINGS.heartbeat) == 1
    job = store.find("anna", claim.job.id)
    assert (job.state, job.crashes) == (State.QUEUED, 0)
    (_, lost) = store.attempts("anna", job.id)
    assert (lost.ending, lost.error_code) == ("lost", "worker_lost")
    again = queue.claim(WORKER)
    assert again is not None
    assert again.attempt == claim.attempt + 1
    assert watch(reaper, clock, TIMINGS.takeover - TIMINGS.heartbeat) == 0, "the new one has a time of its own"


def test_an_attempt_that_renews_is_left_alone(reaper: Reaper, claim: Claim, queue: Queue, clock: Clock) -> None:
    for _ in range(50):
        assert queue.renew([claim])
        assert watch(reaper, clock, TIMINGS.heartbeat) == 0


def test_jumps_of_the_wall_clock_do_nothing(reaper: Reaper, claim: Claim, clock: Clock, now: Clock) -> None:
    reaper.look()
    for jump in (3600.0, -7200.0, 86400.0):
        now.time += jump
        assert watch(reaper, clock, TIMINGS.heartbeat) == 0


def test_a_time_in_which_nobody_looked_counts_little(reaper: Reaper, claim: Claim, clock: Clock) -> None:
    """This machine slept, or the database was away: the workers could not renew either."""
    reaper.look()
    clock.time += 1000.0
    assert reaper.look() == []
    assert watch(reaper, clock, TIMINGS.takeover - 3 * TIMINGS.heartbeat) == 0
    assert watch(reaper, clock, TIMINGS.heartbeat) == 1


def test_two_reapers_give_up_an_attempt_once(queue: Queue, claim: Claim, clock: Clock, store: JobStore) -> None:
    reapers = [Reaper(queue, TIMINGS, clock=clock) for _ in range(2)]
    given_up = 0
    for _ in range(20):
        given_up += sum(len(reaper.look()) for reaper in reapers)
        clock.time += TIMINGS.heartbeat
    assert given_up == 1
    assert store.find("anna", claim.job.id).attempt == claim.attempt


@pytest.mark.parametrize(
    ("wish", "expected"), [("cancel", State.CANCELLED), ("pause", State.PAUSED), (None, State.QUEUED)]
)
def test_what_the_owner_wanted_happens_when_the_worker_is_gone(
    reaper: Reaper, claim: Claim, store: JobStore, clock: Clock, wish: str | None, expected: State
) -> None:
    if wish is not None:
        getattr(store, wish)("anna", claim.job.id)
    reaper.look()
    assert watch(reaper, clock, TIMINGS.takeover) == 1
    assert store.find("anna", claim.job.id).state == expected


def test_a_check_whose_worker_died_is_done_by_another(
    reaper: Reaper, store: JobStore, queue: Queue, clock: Clock
) -> None:
    job, _ = store.create(new_job())
    assert queue.claim(WORKER) is not None
    assert queue.claim(WORKER) is None
    reaper.look()
    watch(reaper, clock, TIMINGS.takeover)
    claim = queue.claim(WORKER)
    assert claim is not None
    assert (claim.job.id, claim.kind, claim.attempt) == (job.id, "check", 2)


def test_workers_that_fell_silent_are_forgotten(reaper: Reaper, queue: Queue, clock: Clock) -> None:
    queue.heartbeat(WorkerRow("dead", "here"))
    reaper.look()
    for _ in range(9):
        queue.heartbeat(WorkerRow("alive", "here"))
        watch(reaper, clock, TIMINGS.heartbeat)
    assert [worker.id for worker in queue.list_workers()] == ["alive"]


def test_it_says_when_it_looked_last(reaper: Reaper, clock: Clock) -> None:
    assert reaper.seconds_since_look is None
    reaper.look()
    clock.time += 3
    assert reaper.seconds_since_look == 3
