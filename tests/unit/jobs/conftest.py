"""A home with a database for each test; marked slow, the same on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from luthier.jobs.database import Database
from luthier.jobs.files import FileStore
from luthier.jobs.job import Job, NewJob, Outcome, Timings, WorkerRow
from luthier.jobs.queue import Queue
from luthier.jobs.store import JobStore
from tests.service.postgres import PostgresServer


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, start: float) -> None:
        self.time = start

    def __call__(self) -> float:
        return self.time


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "server"
    folder.mkdir()
    return folder


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def database(request: pytest.FixtureRequest, home: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        found = Database.at_home(home)
    else:
        found = Database(request.getfixturevalue("postgres").url())
        with found.write() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
    found.migrate()
    yield found
    found.close()


@pytest.fixture
def now() -> Clock:
    """The wall clock."""
    return Clock(1.8e9)


@pytest.fixture
def clock() -> Clock:
    """The monotonic clock of this process."""
    return Clock(1000.0)


@pytest.fixture
def store(database: Database, home: Path, now: Clock) -> JobStore:
    return JobStore(database, home, now=now)


@pytest.fixture
def queue(database: Database, now: Clock, clock: Clock) -> Queue:
    return Queue(database, Timings(), now=now, clock=clock)


@pytest.fixture
def files(database: Database, home: Path, now: Clock) -> FileStore:
    return FileStore(database, home, now=now)


WORKER = WorkerRow("worker-1", "here")


def new_job(project: str = "anna", **fields: Any) -> NewJob:
    return NewJob(project, "own", {"model": {"base": "practice"}}, **fields)


def make_queued(store: JobStore, queue: Queue, project: str = "anna", **fields: Any) -> Job:
    """A job whose files were checked. The queue must hold no other that waits for its check."""
    job, _ = store.create(new_job(project, **fields))
    claim = queue.claim(WORKER)
    assert claim is not None
    assert claim.job.id == job.id
    queue.validated(claim)
    return store.find(project, job.id)


def make_final(store: JobStore, queue: Queue, project: str = "anna") -> Job:
    """A job that succeeded."""
    job = make_queued(store, queue, project, priority=10**6)
    claim = queue.claim(WORKER)
    assert claim is not None
    queue.finish(claim, Outcome("succeeded", model=f"ft:practice:{job.id}", trained_tokens=7))
    return store.find(project, job.id)
