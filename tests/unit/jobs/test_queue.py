"""Jobs as a worker sees them: a fair order, leases, exactly-once reports, and endings."""

from __future__ import annotations

import pytest

from luthier.errors import StaleAttemptError
from luthier.jobs.job import Attempt, Claim, Job, NewEvent, Outcome, State, WorkerRow
from luthier.jobs.queue import Queue
from luthier.jobs.store import JobStore
from tests.unit.jobs.conftest import WORKER, Clock, make_queued, new_job

OTHER = WorkerRow("worker-2", "there")


def take(queue: Queue, worker: WorkerRow = WORKER) -> Claim:
    claim = queue.claim(worker)
    assert claim is not None
    return claim


def held(queue: Queue) -> Attempt:
    (found,) = queue.held()
    return found


class TestOrder:
    """Checks, then priority, then the project with the fewest running, then age."""

    def test_checks_come_first(self, store: JobStore, queue: Queue) -> None:
        make_queued(store, queue, priority=9)
        job, _ = store.create(new_job())
        claim = take(queue)
        assert (claim.job.id, claim.kind, claim.job.state) == (job.id, "check", State.VALIDATING)

    def test_projects_take_turns(self, store: JobStore, queue: Queue) -> None:
        for project in ("anna", "anna", "anna", "ben", "ben", "cleo"):
            make_queued(store, queue, project)
        order = [take(queue).job.project for _ in range(6)]
        assert order == ["anna", "ben", "cleo", "anna", "ben", "anna"]

    def test_priority_comes_before_turns_and_age_last(self, store: JobStore, queue: Queue, now: Clock) -> None:
        first = make_queued(store, queue)
        now.time -= 3600
        second = make_queued(store, queue)
        urgent = make_queued(store, queue, priority=1)
        assert [take(queue).job.id for _ in range(3)] == [urgent.id, first.id, second.id]

    def test_what_does_not_fit_is_passed_over(self, store: JobStore, queue: Queue) -> None:
        for _ in range(60):  # more than are looked at together
            make_queued(store, queue, needs={"devices": 8}, priority=1)
        small = make_queued(store, queue, needs={"devices": 1})

        def fits(job: Job) -> bool:
            return bool(job.needs["devices"] <= 1)

        claim = queue.claim(WORKER, fits)
        assert claim is not None
        assert claim.job.id == small.id
        assert queue.claim(WORKER, fits) is None

    def test_a_project_runs_so_many_at_once(self, store: JobStore, queue: Queue) -> None:
        for project in ("anna", "anna", "ben"):
            make_queued(store, queue, project)
        store.create(new_job())
        found = [queue.claim(WORKER, most_running=1) for _ in range(4)]
        assert [each and (each.job.project, each.kind) for each in found] == [
            ("anna", "check"),
            ("anna", "train"),
            ("ben", "train"),
            None,
        ]


def test_what_waits_after_a_crash_is_left_alone_for_longer_each_time(
    store: JobStore, queue: Queue, clock: Clock, now: Clock
) -> None:
    make_queued(store, queue)
    for pause in (10.0, 20.0):
        queue.finish(take(queue), Outcome("crashed", "boom", "it went boom"))
        assert queue.claim(WORKER) is None
        now.time += 3600  # the wall clock decides nothing
        clock.time += pause - 0.1
        assert queue.claim(WORKER) is None
        clock.time += 0.2
    claim = take(queue)
    assert queue.finish(claim, Outcome("crashed", "boom", "it went boom")) == State.FAILED
    job = store.find("anna", claim.job.id)
    assert (job.crashes, job.error_code) == (3, "max_attempts")
    assert job.error_message == "it crashed 3 times; the last time: it went boom"
    assert [each.ending for each in store.attempts("anna", job.id)] == ["validated", "crashed", "crashed", "crashed"]
    crashes = store.list_events("anna", job.id, kinds=["attempt_crashed"]).items
    assert [event.message for event in crashes] == [f"Attempt {number} crashed: it went boom" for number in (2, 3, 4)]


def test_a_check_that_crashes_three_times_fails_the_job(store: JobStore, queue: Queue, clock: Clock) -> None:
    job, _ = store.create(new_job())
    for _ in range(3):
        queue.finish(take(queue), Outcome("crashed"))
        queue.claim(WORKER)  # sees it wait
        clock.time += 100
    assert store.find("anna", job.id).error_code == "max_attempts"


def test_crashes_of_checks_do_not_count_for_training(store: JobStore, queue: Queue, clock: Clock) -> None:
    job, _ = store.create(new_job())
    for _ in range(2):
        queue.finish(take(queue), Outcome("crashed"))
        queue.claim(WORKER)
        clock.time += 100
    queue.validated(take(queue))
    assert queue.finish(take(queue), Outcome("crashed")) == State.QUEUED
    assert store.find("anna", job.id).crashes == 1


def test_losses_are_not_counted(store: JobStore, queue: Queue) -> None:
    job = make_queued(store, queue)
    for _ in range(5):
        assert queue.finish(take(queue), Outcome("lost", message="the machine went away")) == State.QUEUED
    found = store.find("anna", job.id)
    assert (found.state, found.crashes, found.attempt) == (State.QUEUED, 0, 6)


class TestReports:
    """Lines of a run's events are there once, whoever sends them how often."""

    def test_lines_are_kept_once(self, store: JobStore, queue: Queue) -> None:
        make_queued(store, queue)
        claim = take(queue)
        new = [NewEvent("step_done", "s", step=1)]
        assert queue.report(claim, new, step=1, steps=9, lines=(0, 4)) == 4
        assert queue.report(claim, new, lines=(0, 4)) == 4
        assert queue.report(claim, new, lines=(2, 5)) == 4
        assert queue.report(claim, new, lines=(4, 5)) == 5
        job = store.find("anna", claim.job.id)
        assert (job.step, job.steps) == (1, 9)
        assert len(store.list_events("anna", job.id, kinds=["step_done"]).items) == 2

    def test_the_next_attempt_goes_on_where_the_last_report_ended(self, store: JobStore, queue: Queue) -> None:
        make_queued(store, queue)
        claim = take(queue)
        queue.report(claim, [NewEvent("note", "n")], lines=(0, 3))
        queue.finish(claim, Outcome("lost"), [NewEvent("note", "n")], lines=(3, 5))
        assert take(queue).relayed == 5

    def test_an_ending_with_lines_that_are_kept_already_adds_none(self, store: JobStore, queue: Queue) -> None:
        make_queued(store, queue)
        claim = take(queue)
        queue.report(claim, [NewEvent("note", "n")], lines=(0, 3))
        queue.finish(claim, Outcome("succeeded", model="ft:x"), [NewEvent("note", "n")], lines=(0, 3))
        assert len(store.list_events("anna", claim.job.id, kinds=["note"]).items) == 1

    def test_a_time_of_its_own_is_kept(self, store: JobStore, queue: Queue) -> None:
        make_queued(store, queue)
        claim = take(queue)
        queue.report(claim, [NewEvent("note", "n", created_at=12.5)])
        (event,) = store.list_events("anna", claim.job.id, kinds=["note"]).items
        assert event.created_at == 12.5


class TestFences:
    """Whoever does not hold a job changes nothing of it."""

    def test_every_write_of_an_attempt_that_ended_is_refused(self, store: JobStore, queue: Queue) -> None:
        make_queued(store, queue)
        old = take(queue)
        queue.finish(old, Outcome("lost"))
        new = take(queue, OTHER)
        before = store.find("anna", old.job.id)
        with pytest.raises(StaleAttemptError) as caught:
            queue.report(old, [NewEvent("late", "l")], step=99)
        assert caught.value.code == "stale_attempt"
        assert "attempt 3 of worker `worker-2` holds it" in caught.value.message
        with pytest.raises(StaleAttemptError):
            queue.finish(old, Outcome("succeeded", model="ft:stolen"))
        with pytest.raises(StaleAttemptError):
            queue.started(old, pid=1, process_started="", token="")
        with pytest.raises(StaleAttemptError):
            queue.validated(old)
        assert store.find("anna", old.job.id) == before
        assert queue.renew([old, new]) == {new.job.id}
        assert queue.wanted([old]) == {old.job.id: "gone"}

    def test_a_worker_with_the_right_number_is_not_enough(self, store: JobStore, queue: Queue) -> None:
        make_queued(store, queue)
        claim = take(queue)
        thief = Claim(claim.job, claim.attempt, OTHER.id)
        with pytest.raises(StaleAttemptError):
            queue.finish(thief, Outcome("succeeded"))
        assert queue.renew([thief]) == set()

    def test_of_a_deleted_job_nothing_is_written(self, store: JobStore, queue: Queue) -> None:
        job, _ = store.create(new_job())
        claim = take(queue)
        store.cancel("anna", job.id)
        store.delete("anna", job.id)
        with pytest.raises(StaleAttemptError, match="gone"):
            queue.finish(claim, Outcome("crashed"))


class TestWishes:
    """What owners want of a running job."""

    def test_a_pause_then_a_cancel(self, store: JobStore, queue: Queue) -> None:
        job = make_queued(store, queue)
        claim = take(queue)
        assert queue.wanted([claim]) == {job.id: "run"}
        store.pause("anna", job.id)
        assert queue.wanted([claim]) == {job.id: "pause"}
        store.cancel("anna", job.id)
        assert queue.wanted([claim]) == {job.id: "cancel"}
        assert queue.finish(claim, Outcome("crashed")) == State.CANCELLED
        assert queue.wanted([claim]) == {job.id: "gone"}

    def test_a_pause_and_on(self, store: JobStore, queue: Queue) -> None:
        job = make_queued(store, queue)
        claim = take(queue)
        store.pause("anna", job.id)
        assert queue.finish(claim, Outcome("paused")) == State.PAUSED
        assert queue.claim(WORKER) is None
        store.resume("anna", job.id)
        assert take(queue).attempt == claim.attempt + 1

    def test_a_pause_for_a_full_disk_says_so_until_it_goes_on(self, store: JobStore, queue: Queue) -> None:
        job = make_queued(store, queue)
        queue.finish(take(queue), Outcome("paused", "disk_full", "the disk is full"))
        paused = store.find("anna", job.id)
        assert (paused.state, paused.error_code, paused.error_message) == (
            State.PAUSED,
            "disk_full",
            "the disk is full",
        )
        assert store.resume("anna", job.id).error_code is None

    def test_a_cancel_that_came_after_success_is_told_so(self, store: JobStore, queue: Queue) -> None:
        job = make_queued(store, queue)
        claim = take(queue)
        store.cancel("anna", job.id)
        assert queue.finish(claim, Outcome("succeeded", model="ft:x")) == State.CANCELLED
        assert store.find("anna", job.id).model is None


class TestAdoption:
    """The trainers of a worker that died go on under its successor."""

    def test_an_attempt_changes_hands_with_its_number(self, store: JobStore, queue: Queue) -> None:
        make_queued(store, queue)
        old = take(queue)
        queue.started(old, pid=77, process_started="then", token="secret")
        (attempt,) = queue.held_on("here")
        assert (attempt.pid, attempt.process_started, attempt.token) == (77, "then", "secret")
        assert queue.held_on("there") == []
        new = queue.adopt(attempt, WorkerRow("worker-9", "here"))
        assert new is not None
        assert (new.attempt, new.worker, new.kind) == (old.attempt, "worker-9", "train")
        assert queue.renew([old, new]) == {new.job.id}
        with pytest.raises(StaleAttemptError):
            queue.report(old, [NewEvent("note", "n")])
        queue.finish(new, Outcome("succeeded", model="ft:x"))

    def test_an_attempt_that_is_renewed_stays_where_it_is(self, store: JobStore, queue: Queue) -> None:
        make_queued(store, queue)
        claim = take(queue)
        attempt = held(queue)
        queue.renew([claim])
        assert queue.adopt(attempt, OTHER) is None
        assert queue.lose(attempt, "silence") is False
        assert queue.renew([claim]) == {claim.job.id}

    def test_of_two_adopters_one_gets_it(self, store: JobStore, queue: Queue) -> None:
        make_queued(store, queue)
        take(queue)
        attempt = held(queue)
        assert queue.adopt(attempt, WorkerRow("a", "here")) is not None
        assert queue.adopt(attempt, WorkerRow("b", "here")) is None


def test_workers_are_known_by_their_heartbeats(store: JobStore, queue: Queue, now: Clock) -> None:
    queue.heartbeat(WorkerRow("w", "here", capacity={"processors": 8}, free={"processors": 8}))
    now.time += 5
    queue.heartbeat(WorkerRow("w", "here", capacity={"processors": 8}, free={"processors": 2}))
    (found,) = store.list_workers()
    assert (found.beats, found.free, found.seen_at) == (2, {"processors": 2}, now.time)
    queue.forget_worker("w", beats=1)
    assert len(queue.list_workers()) == 1
    queue.forget_worker("w")
    assert queue.list_workers() == []


def test_an_ending_that_is_none_is_a_mistake(store: JobStore, queue: Queue) -> None:
    make_queued(store, queue)
    with pytest.raises(ValueError, match="succeeded, failed"):
        queue.finish(take(queue), Outcome("done"))


def test_time_stamps_of_states_only_go_on(store: JobStore, queue: Queue, now: Clock) -> None:
    job = make_queued(store, queue)
    stamps = [job.updated_at]
    claim = take(queue)
    for act in (lambda: store.pause("anna", job.id), lambda: queue.finish(claim, Outcome("paused"))):
        now.time -= 3600
        act()
        stamps.append(store.find("anna", job.id).updated_at)
    assert stamps == sorted(set(stamps))
