"""The worker's loop in this process: databases that fail, what fits, siblings, and trainers that are not its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import DatabaseError
from luthier.jobs.attempt import (
    Identity,
    Order,
    attempt_folder,
    read_lease,
    read_stop,
    write_identity,
    write_order,
)
from luthier.jobs.capacity import Capacity
from luthier.jobs.database import Database
from luthier.jobs.job import NewJob, Outcome, State, Timings, WorkerRow
from luthier.jobs.launchers import Ended, Launch
from luthier.jobs.launchers.local import LocalLauncher
from luthier.jobs.processes import when_started
from luthier.jobs.queue import Queue
from luthier.jobs.store import JobStore
from luthier.jobs.worker import Worker, WorkerSettings, _named, machine_name

PROJECT = "anna"
GIB = 1 << 30


class Shelf:
    """A launcher that starts nothing: its trainers live until the test ends them."""

    def __init__(self) -> None:
        self.launched: list[Launch] = []
        self.ended: dict[int, Ended] = {}
        self.signals: list[tuple[int, str]] = []
        self.size = Capacity(processors=4, memory_bytes=8 * GIB, slots=4)

    def submit(self, launch: Launch) -> Identity:
        self.launched.append(launch)
        return Identity(len(self.launched), "then", launch.token)

    def poll(self, ref: Identity) -> Ended | None:
        return self.ended.get(ref.pid)

    def signal(self, ref: Identity, name: str) -> None:
        self.signals.append((ref.pid, name))

    def logs(self, launch: Launch) -> str:
        return ""

    def capacity(self) -> Capacity:
        return self.size


class Office:
    """A worker whose turns the test takes one by one."""

    def __init__(self, home: Path, name: str = "") -> None:
        self.home, self.shelf = home, Shelf()
        (home / "workers").mkdir(parents=True, exist_ok=True)
        self.database = Database.at_home(home)
        self.database.migrate()
        self.store, self.queue = JobStore(self.database, home), Queue(self.database, Timings())
        self.worker = Worker(WorkerSettings(home, timings=Timings(heartbeat=0.0, relay=0.01)), launcher=self.shelf)
        machine = machine_name(home)
        self.worker._open(name or f"{machine}-1", machine)

    def enqueue(self, **needs: Any) -> str:
        spec = {"model": {"base": "practice"}}
        job = self.store.create(NewJob(PROJECT, "own", spec))[0].id
        claim = self.queue.claim(WorkerRow("checker", "elsewhere"), lambda each: each.id == job)
        assert claim is not None
        self.queue.validated(claim, needs={"processors": 1, "memory_bytes": GIB, **needs})
        return job

    def turn(self) -> None:
        self.worker._rest_until = 0.0
        self.worker._turn()

    def state(self, job: str) -> State:
        return self.store.find(PROJECT, job).state


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    opened = Office(tmp_path / "service")
    yield opened
    opened.database.close()


def test_it_takes_what_fits_and_no_more(office: Office) -> None:
    jobs = [office.enqueue(memory_bytes=3 * GIB) for _ in range(3)]
    small = office.enqueue(memory_bytes=2 * GIB)
    office.enqueue(processors=5)
    office.turn()
    running = [job for job in [*jobs, small] if office.state(job) == State.RUNNING]
    assert running == [jobs[0], jobs[1], small]
    assert office.shelf.launched[0].threads == 1
    assert office.shelf.launched[0].memory_bytes == int(4.5 * GIB)
    office.shelf.ended[1] = Ended(-9)
    office.turn()
    assert office.store.find(PROJECT, jobs[0]).crashes == 1
    assert office.store.attempts(PROJECT, jobs[0])[-1].message == "the trainer was ended by SIGKILL"
    assert office.state(jobs[2]) == State.RUNNING


def test_accelerators_are_given_to_one_job_each(tmp_path: Path) -> None:
    office = Office(tmp_path / "service")
    gpus = Capacity(8, 64 * GIB, devices=3, device="cuda", device_name="H100", device_bytes=80 * GIB, slots=3)
    office.worker._place = replace(office.worker._place, capacity=gpus)
    for count in (1, 2, 1):
        office.enqueue(device="cuda", devices=count)
    office.turn()
    assert [each.devices for each in office.shelf.launched] == [(0,), (1, 2)]
    office.database.close()


def test_workers_of_one_machine_share_it(office: Office) -> None:
    first = [office.enqueue(memory_bytes=3 * GIB) for _ in range(2)]
    office.turn()
    assert [office.state(job) for job in first] == [State.RUNNING] * 2
    with _named(office.home) as (taken, machine):  # the first worker's name, so that it counts as alive
        assert taken == f"{machine}-1"
        second = Office(office.home, f"{machine}-2")
        late = second.enqueue(memory_bytes=3 * GIB)
        second.turn()
        assert second.state(late) == State.QUEUED
        office.shelf.ended[1] = Ended(0)
        office.worker._is_ending = True  # it takes no more
        office.turn()
        second.turn()
        assert second.state(late) == State.RUNNING
        assert second.shelf.launched[0].threads == 1
        second.database.close()


def test_while_the_database_is_away_trainers_go_on_and_nothing_is_lost(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = office.enqueue()
    office.turn()
    folder = office.shelf.launched[0].folder
    lease = read_lease(folder)

    def fail(*_: Any, **__: Any) -> None:
        raise DatabaseError("away")

    with monkeypatch.context() as patch:
        for name in ("renew", "claim", "report", "finish", "wanted"):
            patch.setattr(Queue, name, fail)
        for _ in range(3):
            office.turn()
        assert read_lease(folder) == lease  # only a yes of the database renews it
        assert office.worker._retry_seconds == 0.0  # no longer than a heartbeat, which is nothing here
        office.shelf.ended[1] = Ended(1)
        office.turn()
        assert office.shelf.signals == []
    assert office.state(job) == State.RUNNING
    office.turn()
    assert office.store.attempts(PROJECT, job)[-1].ending == "crashed"


def test_a_job_that_was_given_up_has_its_trainer_killed(office: Office) -> None:
    job = office.enqueue()
    office.turn()
    held = next(each for each in office.queue.held() if each.job == job)
    assert office.queue.lose(held, "given up")
    office.worker._settings = replace(office.worker._settings, slots=0)
    office.worker._place = replace(office.worker._place, capacity=replace(office.shelf.size, slots=0))
    office.turn()
    assert office.shelf.signals == [(1, "KILL")]
    assert read_stop(office.shelf.launched[0].folder) == "lost"
    assert office.state(job) == State.QUEUED


def test_an_attempt_that_was_never_started_is_taken_back(office: Office) -> None:
    """Claimed by a worker that died before it started the trainer, or before it said so."""
    job = office.enqueue()
    dead = WorkerRow(f"{machine_name(office.home)}-9", machine_name(office.home))
    claim = office.queue.claim(dead)
    assert claim is not None
    office.turn()
    assert [each.ending for each in office.store.attempts(PROJECT, job)][-2:] == ["lost", None]
    assert read_stop(attempt_folder(office.home, job, claim.attempt)) == "lost"
    assert office.store.find(PROJECT, job).crashes == 0


def test_a_trainer_that_started_before_its_worker_said_so_is_taken_up(office: Office) -> None:
    job = office.enqueue()
    dead = WorkerRow(f"{machine_name(office.home)}-9", machine_name(office.home))
    claim = office.queue.claim(dead)
    assert claim is not None
    folder = attempt_folder(office.home, job, claim.attempt)
    write_order(folder, Order(job, claim.attempt, "word", "run", {}))
    write_identity(folder, Identity(77, "then", "word"))
    office.turn()
    found = office.store.attempts(PROJECT, job)[-1]
    assert (found.pid, found.process_started, found.ended_at) == (77, "then", None)
    assert read_lease(folder) is not None


def test_a_living_worker_keeps_its_attempts(office: Office) -> None:
    with _named(office.home) as (name, machine):
        office.worker._row = WorkerRow("another", machine)
        job = office.enqueue()
        assert office.queue.claim(WorkerRow(name, machine)) is not None
        office.turn()
        assert office.store.attempts(PROJECT, job)[-1].worker == name
    office.turn()
    assert office.store.attempts(PROJECT, job)[1].ending == "lost"


def test_no_process_but_the_very_trainer_is_signalled(tmp_path: Path) -> None:
    launcher = LocalLauncher(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as other:
        started = when_started(other.pid)
        assert started is not None
        wrong = Identity(other.pid, str(int(started) - 1), "token")
        assert launcher.poll(wrong) == Ended()
        launcher.signal(wrong, "KILL")
        launcher.signal(wrong, "TERM")
        launcher.signal(Identity(other.pid, "", "token"), "KILL")
        time.sleep(0.02)
        assert other.poll() is None
        right = Identity(other.pid, started, "token")
        assert launcher.poll(right) is None
        launcher.signal(right, "KILL")
        assert other.wait(10) == -9
        assert launcher.poll(right) == Ended()
    assert when_started(os.getpid()) is not None


def test_outcomes_of_others_are_not_believed(office: Office) -> None:
    """An exit.json with another token is another process's."""
    from luthier.jobs.attempt import Ending

    job = office.enqueue()
    office.turn()
    Ending(office.shelf.launched[0].folder, "another").write(Outcome("succeeded", model="ft:x"))
    office.shelf.ended[1] = Ended()
    office.turn()
    assert office.store.attempts(PROJECT, job)[-1].ending == "crashed"
    office.worker._rest_until = 0.0
