"""Jobs as a worker sees them: claimed, kept by renewing a lease, reported on, finished.

Every write names the fencing number of the attempt, and is refused with StaleAttemptError when another number, or
nobody, holds the job. So whatever a worker does late, or twice, or after it was given up, changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    case,
    delete,
    func,
    insert,
    or_,
    select,
    text,
    update,
)

from luthier.errors import StaleAttemptError
from luthier.jobs import listing
from luthier.jobs.database import Database
from luthier.jobs.endings import settle
from luthier.jobs.job import Attempt, Claim, Job, NewEvent, Outcome, State, Timings, WorkerRow
from luthier.jobs.rows import ATTEMPT_COLUMNS, LOCKED_COLUMNS, as_attempt, as_job
from luthier.jobs.tables import attempts, jobs, workers
from luthier.jobs.transitions import change, end_attempt, lock_job, move

Wish = Literal["run", "pause", "cancel", "gone"]

_HELD = (State.RUNNING.value, State.PAUSING.value, State.CANCELLING.value)
_AT_ONCE = 50


def _takes_any(_job: Job) -> bool:
    return True


class Queue:
    """What workers do with jobs, of all projects. One per worker process: it remembers which wait after a crash."""

    def __init__(
        self,
        database: Database,
        timings: Timings | None = None,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._timings = timings or Timings()
        self._now = now
        self._clock = clock
        self._crashed: dict[tuple[int, int], float] = {}

    def claim(
        self,
        worker: WorkerRow,
        fits: Callable[[Job], bool] = _takes_any,
        *,
        most_running: int | None = None,
    ) -> Claim | None:
        """Take the next job that fits: checks first, then by priority, then projects with fewest running, then age.

        A job in VALIDATING is to be checked (`claim.kind == "check"`), one in QUEUED to be trained. `most_running` is
        how many jobs of one project may run at once.
        """
        for number in self._candidates(fits, most_running):
            with self._database.write() as connection:
                row = connection.execute(_free(number)).one_or_none()
                if row is not None:
                    return self._take(connection, row, worker)
        return None

    def renew(self, claims: Collection[Claim]) -> set[str]:
        """Count the leases on; the ids of the jobs that are still ours. Of the others, stop the trainers."""
        if not claims:
            return set()
        with self._database.write() as connection:
            held = connection.execute(_held_by(claims)).all()
            if not held:
                return set()
            ours = or_(*(_open(row) & (attempts.c.worker == row.holder) for row in held))
            counted = update(attempts).where(ours).values(renewals=attempts.c.renewals + 1)
            still = set(connection.scalars(counted.returning(attempts.c.job)))
            return {row.id for row in held if row.number in still}

    def wanted(self, claims: Collection[Claim]) -> dict[str, Wish]:
        """What the owners of jobs want of attempts: run, pause or cancel; `gone` where the job is not ours now."""
        if not claims:
            return {}
        with self._database.read() as connection:
            states = {row.id: State(row.state) for row in connection.execute(_held_by(claims))}
        return {claim.job.id: _wish(states.get(claim.job.id)) for claim in claims}

    def validated(
        self, claim: Claim, *, needs: Mapping[str, Any] | None = None, events: Sequence[NewEvent] = ()
    ) -> None:
        """The files hold: the job waits for training now, with what it was found to need."""
        with self._writing(claim) as (connection, row, now):
            if State(row.state) != State.VALIDATING:
                raise _stale(claim, row)
            end_attempt(connection, row, "validated", now)
            found = {**row.needs, **(needs or {})}
            move(connection, row, State.QUEUED, now=now, before=events, holder=None, crashes=0, needs=found)

    def started(self, claim: Claim, *, pid: int, process_started: str, token: str) -> None:
        """The process of the attempt runs; this is how it is known again after a restart of the worker."""
        with self._writing(claim) as (connection, row, _now):
            values = {"pid": pid, "process_started": process_started, "token": token}
            connection.execute(update(attempts).where(_open(row)).values(values))

    def report(
        self,
        claim: Claim,
        events: Sequence[NewEvent],
        *,
        step: int | None = None,
        steps: int | None = None,
        lines: tuple[int, int] | None = None,
    ) -> int:
        """Write events of the run, and how far it is; returns how many lines of its events.jsonl are kept in all.

        `lines` says that these events are the lines after the first number up to the second. They are written only when
        exactly the lines before them are kept already: sent twice, or by two workers, they are there once. Go on after
        the number returned.
        """
        with self._writing(claim) as (connection, row, now):
            if lines is not None and lines[0] != row.relayed:
                return int(row.relayed)
            changes: dict[str, Any] = {"step": step, "steps": steps, "relayed": lines and lines[1]}
            changes = {name: value for name, value in changes.items() if value is not None}
            change(connection, row, events, now, **changes)
            return int(changes.get("relayed", row.relayed))

    def finish(
        self,
        claim: Claim,
        outcome: Outcome,
        events: Sequence[NewEvent] = (),
        *,
        lines: tuple[int, int] | None = None,
    ) -> State:
        """End the attempt; the state that the job is in then. `lines` as for `report`.

        A cancel that was asked for wins over everything. A crash puts the job back into the queue until it has crashed
        as often as it may; a loss puts it back and is not counted.
        """
        with self._writing(claim) as (connection, row, now):
            return settle(connection, row, outcome, now, before=events, lines=lines)

    def lose(self, attempt: Attempt, message: str) -> bool:
        """Give up an attempt whose lease has stood still, unless it was renewed meanwhile; whether it was given up."""
        with self._database.write() as connection:
            row = lock_job(connection, jobs.c.id == attempt.job, jobs.c.attempt == attempt.number)
            if row is None or row.holder is None:
                return False
            found = connection.scalar(select(attempts.c.renewals).where(_open(row)))
            if found != attempt.renewals:
                return False
            settle(connection, row, Outcome("lost", "worker_lost", message), self._now())
            return True

    def adopt(self, attempt: Attempt, worker: WorkerRow) -> Claim | None:
        """Take over an attempt of a worker that died: its trainer goes on. None when the attempt has moved since."""
        with self._database.write() as connection:
            row = lock_job(connection, jobs.c.id == attempt.job, jobs.c.attempt == attempt.number)
            if row is None or row.holder != attempt.worker:
                return None
            values = {"worker": worker.id, "machine": worker.machine, "renewals": attempts.c.renewals + 1}
            same = _open(row) & (attempts.c.renewals == attempt.renewals)
            if connection.execute(update(attempts).where(same).values(values)).rowcount != 1:
                return None
            change(connection, row, (), self._now(), holder=worker.id)
            return Claim(as_job(row), attempt.number, worker.id, attempt.kind, row.relayed)

    def held_on(self, machine: str) -> Sequence[Attempt]:
        """The attempts that hold jobs on a machine, whichever worker began them."""
        return self._holding(attempts.c.machine == machine)

    def held(self) -> Sequence[Attempt]:
        """All attempts that hold jobs."""
        return self._holding()

    def heartbeat(self, worker: WorkerRow) -> None:
        """Say that a worker lives, and what it has."""
        values = asdict(worker) | {"seen_at": self._now()}
        values["started_at"] = worker.started_at or values["seen_at"]
        del values["beats"]
        with self._database.write() as connection:
            mine = workers.c.id == worker.id
            known = connection.execute(update(workers).where(mine).values(**values, beats=workers.c.beats + 1))
            if known.rowcount == 0:
                connection.execute(insert(workers).values(**values, beats=1))

    def list_workers(self) -> Sequence[WorkerRow]:
        """The workers that were not given up."""
        with self._database.read() as connection:
            return listing.list_workers(connection)

    def forget_worker(self, worker: str, beats: int | None = None) -> None:
        """Drop a worker that ended; with `beats`, unless it has beaten since."""
        gone = workers.c.id == worker
        with self._database.write() as connection:
            connection.execute(delete(workers).where(gone if beats is None else gone & (workers.c.beats == beats)))

    @contextmanager
    def _writing(self, claim: Claim) -> Iterator[tuple[Connection, Row[Any], float]]:
        """A transaction with the job's row, for the attempt that holds it and no other."""
        with self._database.write() as connection:
            row = lock_job(connection, jobs.c.id == claim.job.id)
            if row is None or row.attempt != claim.attempt or row.holder != claim.worker:
                raise _stale(claim, row)
            yield connection, row, self._now()

    def _holding(self, *conditions: ColumnElement[bool]) -> list[Attempt]:
        query = select(*ATTEMPT_COLUMNS).join(jobs, jobs.c.number == attempts.c.job)
        query = query.where(attempts.c.ended_at.is_(None), *conditions).order_by(attempts.c.job)
        with self._database.read() as connection:
            return [as_attempt(row) for row in connection.execute(query)]

    def _candidates(self, fits: Callable[[Job], bool], most_running: int | None) -> Iterator[int]:
        """Numbers of jobs that may be taken, the best first; asked for some at a time."""
        found = _AT_ONCE
        skipped = 0
        while found == _AT_ONCE:
            with self._database.read() as connection:
                rows = connection.execute(_in_fair_order(most_running).limit(_AT_ONCE).offset(skipped)).all()
            for row in rows:
                if not self._rests(row) and fits(as_job(row)):
                    yield row.number
            found = len(rows)
            skipped += found

    def _rests(self, row: Row[Any]) -> bool:
        """Whether a job that crashed waits still, by our own clock since we first saw it wait."""
        if row.crashes == 0:
            return False
        for known in [each for each in self._crashed if each[0] == row.number and each[1] != row.attempt]:
            del self._crashed[known]
        since = self._crashed.setdefault((row.number, row.attempt), self._clock())
        waits = self._timings.backoff * 2.0 ** int(row.crashes - 1)
        return self._clock() - since < waits

    def _take(self, connection: Connection, row: Row[Any], worker: WorkerRow) -> Claim:
        now = self._now()
        number = row.attempt + 1
        kind = "check" if State(row.state) == State.VALIDATING else "train"
        self._crashed.pop((row.number, row.attempt), None)
        values = {"job": row.number, "number": number, "project": row.project, "kind": kind, "started_at": now}
        connection.execute(insert(attempts).values(**values, worker=worker.id, machine=worker.machine))
        taken: dict[str, Any] = {"attempt": number, "holder": worker.id}
        if kind == "check":
            change(connection, row, (), now, **taken)
        else:
            data = {"attempt": number, "worker": worker.id}
            first = row.started_at or now
            move(connection, row, State.RUNNING, now=now, data=data, started_at=first, **taken)
        locked = lock_job(connection, jobs.c.number == row.number)
        assert locked is not None
        return Claim(as_job(locked), number, worker.id, kind, row.relayed)


def _in_fair_order(most_running: int | None) -> Select[Any]:
    busy = select(jobs.c.project, func.count().label("running")).where(jobs.c.state.in_(_HELD))
    by_project = busy.group_by(jobs.c.project).subquery()
    running = func.coalesce(by_project.c.running, 0)
    query = select(*LOCKED_COLUMNS).outerjoin(by_project, by_project.c.project == jobs.c.project).where(_is_waiting())
    if most_running is not None:
        query = query.where(or_(jobs.c.state == State.VALIDATING.value, running < most_running))
    checks_first = case((jobs.c.state == State.VALIDATING.value, 0), else_=1)
    return query.order_by(checks_first, jobs.c.priority.desc(), running, jobs.c.number)


def _is_waiting() -> ColumnElement[bool]:
    # In the very words of the index, so that the databases see that it serves.
    return text("jobs.holder IS NULL AND jobs.state IN ('validating', 'queued')")  # type: ignore[return-value]


def _free(number: int) -> Select[Any]:
    query = select(*LOCKED_COLUMNS).where(jobs.c.number == number, _is_waiting())
    return query.with_for_update(of=jobs, skip_locked=True)


def _open(row: Row[Any]) -> ColumnElement[bool]:
    """The attempt that holds a locked job."""
    return and_(attempts.c.job == row.number, attempts.c.number == row.attempt, attempts.c.ended_at.is_(None))


def _held_by(claims: Collection[Claim]) -> Select[Any]:
    ours = (
        and_(jobs.c.id == claim.job.id, jobs.c.attempt == claim.attempt, jobs.c.holder == claim.worker)
        for claim in claims
    )
    return select(jobs.c.number, jobs.c.id, jobs.c.state, jobs.c.attempt, jobs.c.holder).where(or_(*ours))


def _wish(state: State | None) -> Wish:
    if state is None:
        return "gone"
    return {State.PAUSING: "pause", State.CANCELLING: "cancel"}.get(state, "run")  # type: ignore[return-value]


def _stale(claim: Claim, row: Row[Any] | None) -> StaleAttemptError:
    if row is None:
        found = "the job is gone"
    elif row.holder is None:
        found = f"the job is {row.state} and nobody holds it"
    else:
        found = f"attempt {row.attempt} of worker `{row.holder}` holds it"
    return StaleAttemptError(
        f"attempt {claim.attempt} of worker `{claim.worker}` does not hold job `{claim.job.id}`: {found}",
        hint="stop its trainer; nothing that it writes is kept",
        where=claim.job.id,
    )
