"""Trainers and workers killed by kill -9: every job ends, once, with the weights it would have had undisturbed."""

from __future__ import annotations

import os
import random
import time

import pytest

from luthier.jobs.job import MOST_CRASHES, State
from luthier.jobs.processes import session_of, when_started
from luthier.runs.manifest import CRASH_VARIABLE
from tests.service.jobs.desk import PROJECT, Desk, check_history, tables, wait_until
from tests.service.jobs.nursery import Nursery
from tests.unit.training.works import NEEDS_TORCH

pytestmark = [pytest.mark.slow, *NEEDS_TORCH]

# LUTHIER_KILLS=50 is the full count; each kill is one process that dies.
KILLS = int(os.environ.get("LUTHIER_KILLS", "0"))


@pytest.fixture(scope="module")
def undisturbed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the final adapter of a job that nobody disturbs."""
    desk = Desk(tmp_path_factory.mktemp("whole"), nursery)
    try:
        job = desk.enqueue(tables())
        desk.start_worker()
        done = desk.wait_for_state(job, State.SUCCEEDED)
        assert done.model == f"ft:practice:{job}"
        assert done.trained_tokens
        assert (done.step, done.steps) == (12, 12)
        assert [each.ending for each in desk.attempts(job)] == ["succeeded"]
        check_history(desk, job)
        return desk.final_hash(job)
    finally:
        desk.close()


def test_a_job_whose_trainer_is_killed_at_any_moment_comes_out_the_same(desk: Desk, undisturbed: str) -> None:
    chance = random.Random(f"trainer {KILLS}")
    desk.start_worker()
    left = KILLS or 4
    while left > 0:
        job, killed = desk.enqueue(tables()), 0
        for number in range(1, MOST_CRASHES):
            step = chance.randint(1, 8) + 4 * (number - 1)
            desk.wait_for_step(job, min(step, 11))
            time.sleep(0.03 * chance.random())
            if desk.find(job).is_final:
                break
            desk.kill_trainer(job)
            killed += 1
            desk.wait_for_attempts(job, killed + 1)
        done = desk.wait_for_state(job, State.SUCCEEDED)
        left -= max(killed, 1)
        endings = [each.ending for each in desk.attempts(job)]
        assert endings.count("succeeded") == 1
        assert endings[-1] == "succeeded"
        assert done.crashes == endings.count("crashed") <= killed
        assert desk.final_hash(job) == undisturbed
        check_history(desk, job)


def test_a_trainer_that_outlives_its_worker_is_taken_up_by_the_next(desk: Desk, undisturbed: str) -> None:
    chance = random.Random(f"worker {KILLS}")
    for _ in range(max(1, KILLS // 3)):
        job = desk.enqueue(tables())
        worker = desk.start_worker()
        pid = desk.trainer(job)
        for _ in range(3):
            time.sleep(0.2 * chance.random())
            worker.signal("SIGKILL")
            worker.wait()
            worker = desk.start_worker()
        desk.wait_for_state(job, State.SUCCEEDED)
        attempts = desk.attempts(job)
        assert [each.pid for each in attempts if each.ending == "succeeded"] == [pid], desk.told(job)
        assert len(attempts) == 1
        assert desk.final_hash(job) == undisturbed
        check_history(desk, job)
        worker.signal("SIGKILL")
        worker.wait()


def test_a_worker_that_is_asked_to_end_leaves_its_trainers(desk: Desk, undisturbed: str) -> None:
    job = desk.enqueue(tables())
    worker = desk.start_worker()
    pid = desk.trainer(job)
    worker.signal("SIGTERM")
    worker.wait()
    assert when_started(pid) is not None
    assert desk.queue.list_workers() == []
    desk.start_worker()
    desk.wait_for_state(job, State.SUCCEEDED)
    assert [each.pid for each in desk.attempts(job)] == [pid]
    assert desk.final_hash(job) == undisturbed


def test_a_trainer_without_a_worker_stops_itself_and_the_next_one_goes_on(hasty_desk: Desk) -> None:
    desk = hasty_desk
    job = desk.enqueue(tables(optim__steps=100_000))
    worker = desk.start_worker()
    pid = desk.trainer(job)
    desk.wait_for_event(job, "step_done", step=3)
    worker.signal("SIGKILL")
    wait_until(lambda: when_started(pid) is None or None)
    assert desk.run_events(job)[-1]["kind"] == "stopped"
    desk.start_worker()
    desk.wait_for_attempts(job, 2)
    assert desk.attempts(job)[0].ending == "lost"
    desk.store.cancel(PROJECT, job)
    desk.wait_for_state(job, State.CANCELLED)
    assert desk.find(job).crashes == 0
    check_history(desk, job)


def test_a_job_whose_worker_stands_still_is_given_to_another(hasty_desk: Desk) -> None:
    """The worker is stopped, not dead: its trainer fences itself, the other worker takes over, and the first wakes."""
    desk = hasty_desk
    job = desk.enqueue(tables(optim__steps=100_000, output__save_every_steps=50))
    first = desk.start_worker()
    pid = desk.trainer(job)
    desk.wait_for_event(job, "step_done", step=1)
    desk.stop(first)
    desk.start_worker()
    desk.wait_for_attempts(job, 2)
    assert when_started(pid) is None
    first.signal("SIGCONT")
    wait_until(lambda: "is not ours any more" in first.log.read_text() or None)
    assert when_started(desk.trainer(job)) is not None
    desk.store.cancel(PROJECT, job)
    desk.wait_for_state(job, State.CANCELLED)
    assert [each.ending for each in desk.attempts(job)] == ["lost", "cancelled"]
    assert desk.find(job).crashes == 0
    check_history(desk, job)


def test_a_job_that_always_crashes_is_tried_three_times(desk: Desk) -> None:
    desk.start_worker(trainer_env={CRASH_VARIABLE: "before_write:1"})
    job = desk.enqueue(tables(output__save_every_steps=1))
    done = desk.wait_for_state(job, State.FAILED)
    attempts = desk.attempts(job)
    assert [each.ending for each in attempts] == ["crashed"] * MOST_CRASHES
    assert done.error_code == "max_attempts"
    assert f"it crashed {MOST_CRASHES} times" in (done.error_message or "")
    assert "the trainer is gone" in (done.error_message or "")
    time.sleep(3 * desk.timings.relay)
    assert len(desk.attempts(job)) == MOST_CRASHES


def test_two_jobs_at_once_on_two_slots(desk: Desk, undisturbed: str) -> None:
    jobs = [desk.enqueue(tables()) for _ in range(2)]
    desk.start_worker(slots=2)
    wait_until(lambda: all(desk.attempts(job) for job in jobs) or None)
    for job in jobs:
        desk.wait_for_state(job, State.SUCCEEDED)
        assert desk.final_hash(job) == undisturbed
        desk.wait_until_gone(f"attempts/{job}/tokens")


def test_a_job_of_two_processes_ends_as_one(desk: Desk) -> None:
    """Its processes are killed with it, are asked to stop with it, and come to one result."""
    desk.start_worker()
    job = desk.enqueue(tables(compute__processes=2, optim__steps=60))
    desk.wait_for_step(job, 3)
    pids = session_of(desk.trainer(job))
    assert len(pids) == 3
    desk.kill_trainer(job)
    desk.wait_for_attempts(job, 2)
    wait_until(lambda: not any(when_started(pid) for pid in pids) or None)
    desk.wait_for_step(job, 12)
    desk.store.pause(PROJECT, job)
    desk.wait_for_state(job, State.PAUSED)
    desk.store.resume(PROJECT, job)
    desk.wait_for_state(job, State.SUCCEEDED)
    assert [each.ending for each in desk.attempts(job)] == ["crashed", "paused", "succeeded"]
    check_history(desk, job)
