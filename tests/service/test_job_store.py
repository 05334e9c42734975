"""What the job store promises while processes are killed: nothing acknowledged is lost, nothing is done twice.

Short forms, on the store itself; with LUTHIER_SOAK set, the full counts.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import func, select

from luthier.errors import ConflictError, DatabaseError, StaleAttemptError
from luthier.jobs.database import Database
from luthier.jobs.job import Idempotency, NewEvent, NewJob, Outcome, State, WorkerRow
from luthier.jobs.queue import Queue
from luthier.jobs.store import JobStore
from luthier.jobs.tables import attempts, events, jobs
from tests.service.postgres import PostgresServer

pytestmark = pytest.mark.slow

T = TypeVar("T")
FULL = bool(os.environ.get("LUTHIER_SOAK"))
WORKER = WorkerRow("worker-1", "here")
NEW = NewJob("anna", "own", {"model": {"base": "practice"}})

CREATE = """
import json, sys, threading
from luthier.jobs.database import Database
from luthier.jobs.job import Idempotency, NewJob
from luthier.jobs.store import JobStore
from pathlib import Path

home, requests = Path(sys.argv[1]), json.loads(sys.stdin.readline())
store = JobStore(Database.at_home(home), home)
lock = threading.Lock()

def create(mine):
    for name in mine:
        asked = Idempotency("key", name, header=name)
        job, _ = store.create(NewJob("anna", "own", {"model": {"base": "practice"}}), idempotency=asked)
        with lock:
            sys.stdout.write(f"{name} {job.id}\\n")
            sys.stdout.flush()

threads = [threading.Thread(target=create, args=(requests[place::8],)) for place in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""

CLAIM = """
import sys
from luthier.jobs.database import Database
from luthier.jobs.job import Outcome, WorkerRow
from luthier.jobs.queue import Queue

queue = Queue(Database(sys.argv[1]))
worker = WorkerRow(sys.argv[2], "here")
sys.stdin.readline()
while claim := queue.claim(worker):
    if claim.kind == "check":
        queue.validated(claim)
    else:
        queue.finish(claim, Outcome("succeeded", model="ft:" + claim.job.id))
    print(claim.kind, claim.job.id, flush=True)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    database = Database.at_home(tmp_path)
    database.migrate()
    database.close()
    return tmp_path


@pytest.fixture
def postgres() -> Iterator[PostgresServer]:
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


def test_no_job_that_was_acknowledged_is_lost_when_the_writer_is_killed(home: Path) -> None:
    """R1: eight threads create while their process is killed at random moments; what was cut is asked again."""
    rounds, per_round = (200, 25) if FULL else (5, 120)
    chance = random.Random(7)
    acknowledged: dict[str, str] = {}
    open_requests: list[str] = []
    for number in range(rounds + 1):
        is_last = number == rounds
        open_requests += [] if is_last else [f"{number}-{each}" for each in range(per_round)]
        process = subprocess.Popen(
            [sys.executable, "-c", CREATE, home], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(open_requests) + "\n")
        process.stdin.close()
        until = None if is_last else chance.randint(1, per_round // 2)
        for count, line in enumerate(process.stdout, start=1):
            _keep(acknowledged, line)
            if count == until:
                process.kill()
        process.wait()
        process.stdout.close()
        open_requests = [name for name in open_requests if name not in acknowledged]
    assert open_requests == []
    assert len(set(acknowledged.values())) == len(acknowledged) == rounds * per_round
    _check_rows(Database.at_home(home), set(acknowledged.values()))


def _keep(acknowledged: dict[str, str], line: str) -> None:
    if line.endswith("\n"):
        name, job = line.split()
        assert acknowledged.setdefault(name, job) == job, "one request, one job"


def _check_rows(database: Database, expected: set[str]) -> None:
    """Exactly these jobs, each with its events from the first to the last."""
    with database.read() as connection:
        found = {row.id: row.number for row in connection.execute(select(jobs.c.id, jobs.c.number))}
        last = {row.number: row.last_seq for row in connection.execute(select(jobs.c.number, jobs.c.last_seq))}
        counted = select(events.c.job, func.count(), func.max(events.c.seq)).group_by(events.c.job)
        happened = {row[0]: (row[1], row[2]) for row in connection.execute(counted)}
    database.close()
    assert set(found) == expected
    assert happened == {number: (seq, seq) for number, seq in last.items()}


def test_workers_of_several_processes_never_take_a_job_twice(home: Path) -> None:
    database = Database.at_home(home)
    _claim_all(database, home, f"sqlite:///{home / 'luthier.db'}")


def test_workers_of_several_processes_never_take_a_job_twice_on_postgres(home: Path, postgres: PostgresServer) -> None:
    database = Database(postgres.url())
    database.migrate()
    _claim_all(database, home, postgres.url())


def _claim_all(database: Database, home: Path, url: str) -> None:
    store = JobStore(database, home)
    made = [store.create(NEW)[0].id for _ in range(1000 if FULL else 60)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, url, f"w{number}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for number in range(8 if FULL else 3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    done = Counter(line for process in processes for line in process.communicate()[0].splitlines())
    assert [process.returncode for process in processes] == [0] * len(processes)
    assert done == Counter({f"{kind} {job}": 1 for kind in ("check", "train") for job in made})
    with database.read() as connection:
        assert connection.scalar(select(func.max(attempts.c.number))) == 2
    assert store.count_by_state()[State.SUCCEEDED] == len(made)
    database.close()


def test_a_cancel_and_an_ending_at_once_leave_one_final_state(home: Path) -> None:
    """R13: an owner cancels while the worker finishes; whoever is first decides, and nothing follows."""
    database = Database.at_home(home)
    store, queue = JobStore(database, home), Queue(database)
    endings = Counter(_race(store, queue, number) for number in range(1000 if FULL else 80))
    assert set(endings) <= {State.SUCCEEDED, State.CANCELLED}
    database.close()


def _race(store: JobStore, queue: Queue, number: int) -> State:
    job, _ = store.create(NEW)
    for _ in range(2):
        claim = queue.claim(WORKER)
        assert claim is not None
        if claim.kind == "check":
            queue.validated(claim)
    told: dict[str, State] = {}
    start = threading.Barrier(2)

    def cancel() -> None:
        start.wait()
        try:
            told["cancel"] = store.cancel("anna", job.id).state
        except ConflictError:
            told["cancel"] = State.SUCCEEDED

    def finish() -> None:
        start.wait()
        if number % 2:
            store.list_jobs("anna", limit=1)  # another moment
        told["finish"] = queue.finish(claim, Outcome("succeeded", model=f"ft:{job.id}"))

    threads = [threading.Thread(target=each) for each in (cancel, finish)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = store.find("anna", job.id)
    assert found.is_final
    assert told["finish"] == found.state
    assert (told["cancel"] == State.SUCCEEDED) == (found.state == State.SUCCEEDED)
    assert (found.model is None) == (found.state == State.CANCELLED)
    changes = store.list_events("anna", job.id, kinds=["state_changed"]).items
    assert [each.data["to"] for each in changes if State(each.data["to"]) == found.state] == [found.state]
    with pytest.raises(StaleAttemptError):
        queue.finish(claim, Outcome("succeeded"))
    return found.state


def test_a_database_that_is_killed_loses_nothing_and_comes_back(home: Path, postgres: PostgresServer) -> None:
    """R9: writers meet DatabaseError, and only that; the same objects go on when it is there again."""
    database = Database(postgres.url(), patience=2)
    database.migrate()
    store, queue = JobStore(database, home), Queue(database)
    job, _ = store.create(NEW)
    for _ in range(2):
        claim = queue.claim(WORKER)
        assert claim is not None
        if claim.kind == "check":
            queue.validated(claim)
    errors: list[BaseException] = []
    made: list[str] = []
    ended = threading.Event()

    def create() -> None:
        number = 0
        while not ended.is_set():
            try:
                number += 1
                name = f"{threading.get_ident()}-{number}"
                asked = Idempotency("key", name, header=name)
                made.append(_insist(partial(store.create, NEW, idempotency=asked))[0].id)
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=create) for _ in range(3)]
    for thread in threads:
        thread.start()
    lines = 0
    for _ in range(20 if FULL else 3):
        for _ in range(20):
            new = [NewEvent("step_done", "s", step=lines)]
            lines = _insist(partial(queue.report, claim, new, lines=(lines, lines + 1)))
        postgres.kill()
        with pytest.raises(DatabaseError):
            store.find("anna", job.id)
        postgres.start()
        begun = time.monotonic()
        assert _insist(partial(queue.renew, [claim])) == {job.id}
        assert time.monotonic() - begun < 5
    ended.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(store.list_events("anna", job.id, kinds=["step_done"], limit=1000).items) == lines
    with database.read() as connection:
        found = connection.scalars(select(jobs.c.id)).all()
    assert len(found) == len(set(found))
    assert set(found) == {job.id, *made}
    database.close()


def _insist(ask: Callable[[], T]) -> T:
    """Ask again while the database is away, as every client of ours does."""
    while True:
        try:
            return ask()
        except DatabaseError:
            time.sleep(0.05)


def test_a_page_of_a_million_events_takes_no_longer_than_of_ten(home: Path) -> None:
    database = Database.at_home(home)
    store = JobStore(database, home)
    job, _ = store.create(NEW)
    count = 1_000_000
    with database.write() as connection:
        number = connection.scalar(select(jobs.c.number))
        connection.exec_driver_sql(
            "WITH RECURSIVE counted(seq) AS (SELECT 2 UNION ALL SELECT seq + 1 FROM counted WHERE seq < ?) "
            "INSERT INTO events SELECT ?, seq, 'anna', 1.0, 'info', CASE seq % 100 WHEN 0 THEN 'evaluated' ELSE "
            "'step_done' END, 'a step was taken', seq, '{\"loss\":1.5}' FROM counted",
            (count, number),
        )
        connection.execute(jobs.update().values(last_seq=count))
    asked: list[dict[str, Any]] = [
        {"after_seq": after} | more
        for after in (0, count // 2, count - 50)
        for more in ({}, {"kinds": ["evaluated"]}, {"newest_first": True}, {"kinds": ["evaluated", "step_done"]})
    ]
    asked += [{"kinds": ["evaluated"], "after_step": step} for step in (0, 500_000, 999_000)]
    asked += [{"newest_first": True, "before_seq": 500_000}, {"kinds": ["none"]}]
    questions = [partial(store.list_events, "anna", job.id, limit=100, **each) for each in asked]
    slow = []
    for ask in [*questions, partial(store.new_events, {job.id: count - 50})]:
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            ask()
            seconds.append(time.perf_counter() - begun)
        if min(seconds) >= 0.1:
            slow.append((min(seconds), ask))
    assert slow == []
    database.close()
