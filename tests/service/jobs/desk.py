"""A server's home without its server: jobs put into the queue, workers started on it, and what became of both."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from luthier.jobs.database import FILE, Database
from luthier.jobs.files import FileStore
from luthier.jobs.job import Attempt, Job, JobEvent, NewJob, State, Timings, WorkerRow
from luthier.jobs.processes import end_session, when_started
from luthier.jobs.queue import Queue
from luthier.jobs.store import JobStore
from luthier.runs.events import read_events
from luthier.runs.manifest import hash_file
from tests.service.jobs.nursery import Forked, Nursery
from tests.unit.training.works import ADAPTER, chat_rows

PROJECT = "one"
PATIENCE_SECONDS = 180.0
# All ten times as fast, but for the lease: no machine is so busy that a worker forgets its trainer.
TIMINGS = replace(Timings().scaled(0.1), backoff=0.05, fence=120.0, kill=150.0, takeover=240.0)
# For tests that wait until a lease or a grace is over.
HASTY = replace(TIMINGS, fence=2.5, kill=3.0, takeover=4.5, grace=1.0)
T = TypeVar("T")


def tables(**changes: Any) -> dict[str, Any]:
    """A spec of the practice model in fp32, with dropout; changes by `table__key`."""
    made: dict[str, Any] = {
        "seed": 1,
        "model": {"base": "practice"},
        "data": {"valid": 0},
        "method": {"kind": "lora", "rank": 4, "targets": ["q_proj", "v_proj"], "dropout": 0.1},
        "optim": {"batch": 2, "steps": 12, "learning_rate": 5e-3, "warmup_steps": 1},
        "output": {"save_every_steps": 2},
        "compute": {"precision": "fp32"},
    }
    for name, value in changes.items():
        table, _, key = name.partition("__")
        made[table] = {**made.get(table, {}), key: value}
    return made


def wait_until(found: Callable[[], T | None], told: Callable[[], object] = str) -> T:
    """Look again and again until there is something."""
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        if there := found():
            return there
        time.sleep(0.005)
    raise AssertionError(f"nothing for {PATIENCE_SECONDS:.0f} s\n{told()}")


class Desk:
    """One home."""

    def __init__(self, home: Path, nursery: Nursery | None = None, timings: Timings = TIMINGS) -> None:
        self.home, self._nursery, self.timings = home, nursery, timings
        self.database = Database.at_home(home)
        self.database.migrate()
        self.files = FileStore(self.database, home)
        self.store = JobStore(self.database, home)
        self.queue = Queue(self.database, timings)
        self.workers: list[Forked] = []

    # -- what a server would do ------------------------------------------------------------------------------------

    def add_file(self, rows: Sequence[Any], filename: str = "rows.jsonl") -> str:
        """A stored file of rows (or of raw lines)."""
        incoming = self.files.begin(PROJECT, "fine-tune", filename, limit_bytes=1 << 30)
        for row in rows:
            incoming.write(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n")
        return incoming.finish().id

    def submit(self, spec: Mapping[str, Any] | None = None, file: str | None = None, **more: Any) -> str:
        """A job that waits to be checked."""
        file = file or self.add_file(chat_rows(8))
        given = dict(spec or tables())
        given["data"] = {**given.get("data", {}), "train": file}
        return self.store.create(NewJob(PROJECT, "own", given, training_file=file, **more))[0].id

    def enqueue(self, spec: Mapping[str, Any] | None = None, **more: Any) -> str:
        """A job that waits for training, as if it had been checked; a worker that is quicker checks it itself."""
        job = self.submit(spec, **more)
        claim = self.queue.claim(WorkerRow("checker", "elsewhere"), lambda each: each.id == job)
        if claim is not None:
            self.queue.validated(claim, needs={"processors": 1, "memory_bytes": 1 << 30, "device": "cpu"})
        return job

    def start_worker(self, **how: Any) -> Forked:
        """A worker process."""
        assert self._nursery is not None
        self.workers.append(self._nursery.start_worker(self.home, self.timings, **how))
        return self.workers[-1]

    def stop(self, worker: Forked) -> None:
        """Let it stand still, but not in the middle of a write: nobody else could write before it goes on."""

        def stand() -> bool | None:
            worker.signal("SIGSTOP")
            if self._takes_writes():
                return True
            worker.signal("SIGCONT")
            return None

        wait_until(stand)

    def _takes_writes(self) -> bool:
        with closing(sqlite3.connect(self.home / FILE, timeout=0.2)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
        return True

    def close(self) -> None:
        """End the workers and their trainers."""
        for worker in self.workers:
            if worker.is_there:
                worker.signal("SIGCONT")
                worker.signal("SIGKILL")
        for path in self.home.glob("attempts/*/*/token"):
            known = json.loads(path.read_bytes())
            if when_started(known["pid"]) == known["started"]:
                end_session(known["pid"])
        self.database.close()

    # -- what became of it -----------------------------------------------------------------------------------------

    def find(self, job: str) -> Job:
        return self.store.find(PROJECT, job)

    def events(self, job: str) -> Sequence[JobEvent]:
        return self.store.list_events(PROJECT, job, limit=10_000).items

    def attempts(self, job: str) -> list[Attempt]:
        """Those that trained."""
        return [each for each in self.store.attempts(PROJECT, job) if each.kind == "train"]

    def run(self, job: str) -> Path:
        return self.home / "runs" / job

    def run_events(self, job: str) -> list[dict[str, Any]]:
        return read_events(self.run(job) / "events.jsonl")

    def final_hash(self, job: str) -> str:
        return hash_file(self.run(job) / ADAPTER)

    def wait_for_state(self, job: str, state: State) -> Job:
        """The job in this state; another final one fails the test."""

        def look() -> Job | None:
            found = self.find(job)
            assert found.state == state or not found.is_final, self.told(job)
            return found if found.state == state else None

        return wait_until(look, lambda: self.told(job))

    def wait_for_event(self, job: str, kind: str, **facts: Any) -> dict[str, Any]:
        """An event of the run, from its own log."""

        def look() -> dict[str, Any] | None:
            wanted = {"kind": kind, **facts}.items()
            return next(
                (each for each in self.run_events(job) if wanted <= {k: each.get(k) for k in dict(wanted)}.items()),
                None,
            )

        return wait_until(look, lambda: self.told(job))

    def wait_for_step(self, job: str, step: int) -> None:
        """Until the database has heard of this step, or the job is over."""
        wait_until(lambda: self._has_step(job, step) or None, lambda: self.told(job))

    def _has_step(self, job: str, step: int) -> bool:
        found = self.find(job)
        return found.is_final or (found.step or 0) >= step

    def wait_for_attempts(self, job: str, count: int) -> None:
        """Until it was tried so often, or is over."""
        wait_until(lambda: self.find(job).is_final or len(self.attempts(job)) >= count or None, lambda: self.told(job))

    def wait_until_gone(self, name: str) -> None:
        """Until there is no such file in the home."""
        wait_until(lambda: not (self.home / name).exists() or None)

    def trainer(self, job: str) -> int:
        """The pid of the attempt that holds the job, once the database knows it."""

        def look() -> int | None:
            return next((each.pid for each in self.attempts(job) if each.ended_at is None), None)

        return wait_until(look, lambda: self.told(job))

    def signal_trainer(self, job: str, name: str) -> None:
        os.kill(self.trainer(job), signal.Signals[name])

    def kill_trainer(self, job: str) -> None:
        os.kill(self.trainer(job), signal.SIGKILL)

    def told(self, job: str) -> str:
        """Everything that is known, for a failed test."""
        logs = [path.read_text("utf-8", "replace") for path in self.home.glob("attempts/*/*/log.txt")]
        parts = [
            self.find(job),
            *self.events(job),
            *self.attempts(job),
            *(w.log.read_text() for w in self.workers),
            *logs,
        ]
        return "\n".join(str(each) for each in parts)


def check_history(desk: Desk, job: str) -> None:
    """One writer at a time: numbers without gaps, steps that follow one another, each line in the database once."""
    events = desk.run_events(job)
    assert [each["seq"] for each in events] == list(range(1, len(events) + 1))
    step: int | None = None
    for each in events:
        if each["kind"] == "resumed":
            step = each["step"]
        elif each["kind"] == "step_done":
            assert step is None or each["step"] == step + 1, f"two wrote: {each} after step {step}"
            step = each["step"]
    kept = desk.events(job)
    assert [each.seq for each in kept] == list(range(1, len(kept) + 1))
    relayed = [(each.kind, each.step) for each in kept if each.kind in {e["kind"] for e in events}]
    assert relayed == [(each["kind"], each.get("step")) for each in events]
