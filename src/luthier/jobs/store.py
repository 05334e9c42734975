"""Jobs as a server sees them: created, listed, asked to stop, deleted. Workers see them through `queue`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Integer, Row, bindparam, delete, func, insert, select, update

from luthier.errors import ConflictError, QuotaError
from luthier.jobs import again, listing
from luthier.jobs.database import Database
from luthier.jobs.ids import new_id
from luthier.jobs.job import (
    FINAL,
    Attempt,
    Idempotency,
    Job,
    JobEvent,
    Model,
    NewEvent,
    NewJob,
    Quota,
    State,
    WorkerRow,
)
from luthier.jobs.removal import remove_models, remove_run
from luthier.jobs.rows import (
    ATTEMPT_COLUMNS,
    JOB_COLUMNS,
    Page,
    as_attempt,
    as_job,
    as_model,
    no_such,
    number_of,
)
from luthier.jobs.tables import attempts, events, files, jobs
from luthier.jobs.transitions import end_attempt, lock_job, move, write_events

_UNFINISHED = sorted(str(state) for state in State if state not in FINAL)
_DELETED_AT_ONCE = 10_000
# What every new job needs is put together once: that takes longer than running it.
_INSERT = insert(jobs).returning(jobs.c.number, *JOB_COLUMNS)
_UP_TO = (
    select(jobs.c.number)
    .where(jobs.c.project == bindparam("of"), jobs.c.state.in_(_UNFINISHED))
    .limit(bindparam("most", type_=Integer))
)
_COUNT_UP_TO = select(func.count()).select_from(_UP_TO.subquery())


class JobStore:
    """Every question names the project that asks; another project's job is not there."""

    def __init__(self, database: Database, home: Path, *, now: Callable[[], float] = time.time) -> None:
        self._database = database
        self._home = home
        self._now = now

    def create(
        self, new: NewJob, *, idempotency: Idempotency | None = None, quota: Quota | None = None
    ) -> tuple[Job, bool]:
        """A new job in VALIDATING with its event `job_created`; or the one that the same request made before, and True.

        It is on the disk on return. IdempotencyError, QuotaError; NotFoundError for a file that is not there.
        """
        with self._database.write() as connection:
            self._database.lock(connection, f"new job of {new.project}")
            if idempotency and (number := again.find(connection, new.project, idempotency, self._now())) is not None:
                return _load(connection, jobs.c.number == number), True
            _check_quota(connection, new.project, quota)
            _check_files(connection, new)
            job, number = self._insert(connection, new)
            if idempotency:
                again.remember(connection, new.project, idempotency, number, self._now())
            return job, False

    def find(self, project: str, job: str) -> Job:
        """The job; NotFoundError when this project has none of that id."""
        with self._database.read() as connection:
            return _load(connection, jobs.c.id == job, jobs.c.project == project, name=job)

    def list_jobs(
        self,
        project: str,
        *,
        after: str | None = None,
        limit: int = 20,
        states: Collection[State] | None = None,
        metadata: Mapping[str, str] | None = None,
        without_metadata: bool = False,
        dialects: Collection[str] | None = None,
        newest_first: bool = True,
    ) -> Page[Job]:
        """Jobs in the order in which they were created; `after` is the id of the last one seen."""
        with self._database.read() as connection:
            return listing.list_jobs(
                connection,
                project,
                after=after,
                limit=limit,
                states=states,
                metadata=metadata,
                without_metadata=without_metadata,
                dialects=dialects,
                newest_first=newest_first,
            )

    def cancel(self, project: str, job: str) -> Job:
        """Ask a job to stop for good. One that waits is cancelled at once; one that ended otherwise: ConflictError."""
        return self._ask(project, job, "cancelled", _cancel)

    def pause(self, project: str, job: str) -> Job:
        """Ask a job to save and stop, until it is resumed; one that waits is paused at once."""
        return self._ask(project, job, "paused", _pause)

    def resume(self, project: str, job: str) -> Job:
        """Put a paused job back into the queue."""
        return self._ask(project, job, "resumed", _resume)

    def delete(self, project: str, job: str) -> None:
        """Delete a job that has ended: its run folder from the disk, then its rows."""
        found = self.find(project, job)
        if not found.is_final:
            raise ConflictError(
                f"job `{job}` is {found.state} and cannot be deleted", hint="cancel it first", where=job
            )
        remove_run(self._home, found.id)
        self._delete_events(found)
        with self._database.write() as connection:
            connection.execute(delete(jobs).where(jobs.c.id == job, jobs.c.project == project))

    def list_events(
        self,
        project: str,
        job: str,
        *,
        after_seq: int = 0,
        limit: int = 100,
        newest_first: bool = False,
        before_seq: int | None = None,
        kinds: Collection[str] | None = None,
        after_step: int | None = None,
    ) -> Page[JobEvent]:
        """Events of a job by number; with `after_step` (which needs `kinds`) those of later steps, by step."""
        with self._database.read() as connection:
            return listing.list_events(
                connection,
                number_of(connection, project, job),
                after_seq=after_seq,
                limit=limit,
                newest_first=newest_first,
                before_seq=before_seq,
                kinds=kinds,
                after_step=after_step,
            )

    def last_seq(self, ids: Collection[str]) -> dict[str, int]:
        """The number of the newest event of each job; a job that is gone is left out."""
        if not ids:
            return {}
        with self._database.read() as connection:
            rows = connection.execute(select(jobs.c.id, jobs.c.last_seq).where(jobs.c.id.in_(ids)))
            return {row.id: row.last_seq for row in rows}

    def new_events(self, seen: Mapping[str, int]) -> dict[str, list[JobEvent]]:
        """Of many jobs at once, the events after the number of each that was seen. For one who has found the jobs."""
        with self._database.read() as connection:
            return listing.new_events(connection, seen) if seen else {}

    def attempts(self, project: str, job: str) -> Sequence[Attempt]:
        """What was tried for a job, the first try first."""
        with self._database.read() as connection:
            number = number_of(connection, project, job)
            query = select(*ATTEMPT_COLUMNS).join(jobs, jobs.c.number == attempts.c.job)
            rows = connection.execute(query.where(attempts.c.job == number).order_by(attempts.c.number))
            return [as_attempt(row) for row in rows]

    def list_models(self, project: str, *, after: str | None = None, limit: int = 1000) -> Page[Model]:
        """The results that were not deleted, the newest first; `after` is the `ft:` id of the last one seen."""
        with self._database.read() as connection:
            found = listing.list_models(connection, project, after=after, limit=limit)
        return Page([as_model(job) for job in found.items], found.has_more)

    def find_model(self, project: str, model: str) -> Model:
        """The result of this `ft:` id; NotFoundError when it was deleted or never was."""
        with self._database.read() as connection:
            return as_model(_load_model(connection, project, model))

    def delete_model(self, project: str, model: str) -> None:
        """Delete a result's weights and checkpoints from the disk; the job and its reports stay."""
        with self._database.write() as connection:
            found = _load_model(connection, project, model)
            users = select(jobs.c.id).where(jobs.c.base == model, jobs.c.state.in_(_UNFINISHED)).limit(1)
            if (user := connection.scalar(users)) is not None:
                raise ConflictError(
                    f"model `{model}` is the base of job `{user}`, which has not ended", hint="cancel that job first"
                )
            gone = {"model_deleted_at": self._now()}
            connection.execute(update(jobs).where(jobs.c.id == found.id, jobs.c.project == project).values(gone))
        # The row first: a crash between the two leaves files that nobody is shown, and `sweep` removes them.
        remove_models(self._home, found.id)

    def sweep(self) -> None:
        """Finish deletions that a crash cut short, and forget requests too old to come again; at start and hourly."""
        with self._database.write() as connection:
            again.forget(connection, self._now())
            deleted = connection.scalars(select(jobs.c.id).where(jobs.c.model_deleted_at.is_not(None))).all()
        for job in deleted:
            remove_models(self._home, job)

    def list_workers(self) -> Sequence[WorkerRow]:
        """The workers that were not given up."""
        with self._database.read() as connection:
            return listing.list_workers(connection)

    def count_by_state(self) -> dict[State, int]:
        """How many jobs of all projects stand where."""
        with self._database.read() as connection:
            rows = connection.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state)).all()
        return dict.fromkeys(State, 0) | {State(row[0]): int(row[1]) for row in rows}

    def count_endings(self) -> dict[str, int]:
        """How many attempts of all projects ended how."""
        with self._database.read() as connection:
            ended = select(attempts.c.ending, func.count()).where(attempts.c.ending.is_not(None))
            return {row[0]: int(row[1]) for row in connection.execute(ended.group_by(attempts.c.ending))}

    def _insert(self, connection: Connection, new: NewJob) -> tuple[Job, int]:
        now = self._now()
        values: dict[str, Any] = {
            "id": new_id("ftjob-"),
            "project": new.project,
            "dialect": new.dialect,
            "state": str(State.VALIDATING),
            "spec": new.spec,
            "request": new.request,
            "base": str(new.spec["model"]["base"]),
            "training_file": new.training_file,
            "validation_file": new.validation_file,
            "suffix": new.suffix,
            "metadata": new.metadata,
            "priority": new.priority,
            "needs": new.needs,
            "key": new.key,
            "created_at": now,
            "updated_at": now,
            "last_seq": 1 + len(new.notes),
        }
        row = connection.execute(_INSERT, values).one()
        created = NewEvent("job_created", "The job was created", data={"state": str(State.VALIDATING)})
        noted = [NewEvent("noted", note) for note in new.notes]
        write_events(connection, row.number, new.project, 0, [created, *noted], now)
        return as_job(row[1:]), row.number

    def _delete_events(self, job: Job) -> None:
        """Some at a time, so that nobody waits for a million of them."""
        number = select(jobs.c.number).where(jobs.c.id == job.id, jobs.c.project == job.project).scalar_subquery()
        for last in range(_DELETED_AT_ONCE, job.last_seq, _DELETED_AT_ONCE):
            with self._database.write() as connection:
                connection.execute(delete(events).where(events.c.job == number, events.c.seq <= last))

    def _ask(self, project: str, job: str, wish: str, act: Callable[[Connection, Row[Any], float], bool]) -> Job:
        with self._database.write() as connection:
            row = lock_job(connection, jobs.c.id == job, jobs.c.project == project)
            if row is None:
                raise no_such("job", job)
            if not act(connection, row, self._now()):
                raise ConflictError(f"job `{job}` is {row.state} and cannot be {wish}", where=job)
            return _load(connection, jobs.c.number == row.number)


def _cancel(connection: Connection, row: Row[Any], now: float) -> bool:
    state = State(row.state)
    if state in (State.CANCELLING, State.CANCELLED):
        return True
    if state in (State.RUNNING, State.PAUSING):
        move(connection, row, State.CANCELLING, now=now)
        return True
    if state in FINAL:
        return False
    end_attempt(connection, row, "cancelled", now)  # of the check, while VALIDATING
    move(connection, row, State.CANCELLED, now=now, holder=None)
    return True


def _pause(connection: Connection, row: Row[Any], now: float) -> bool:
    state = State(row.state)
    if state in (State.RUNNING, State.QUEUED):
        move(connection, row, State.PAUSING if state == State.RUNNING else State.PAUSED, now=now)
    return state in (State.RUNNING, State.QUEUED, State.PAUSING, State.PAUSED)


def _resume(connection: Connection, row: Row[Any], now: float) -> bool:
    state = State(row.state)
    if state == State.PAUSED:
        move(connection, row, State.QUEUED, now=now, error_code=None, error_message=None)
    return state in (State.PAUSED, State.QUEUED, State.RUNNING)


def _load(connection: Connection, *conditions: Any, name: str = "") -> Job:
    row = connection.execute(select(*JOB_COLUMNS).where(*conditions)).one_or_none()
    if row is None:
        raise no_such("job", name)
    return as_job(row)


def _load_model(connection: Connection, project: str, model: str) -> Job:
    mine = (jobs.c.model == model, jobs.c.project == project, jobs.c.model_deleted_at.is_(None))
    row = connection.execute(select(*JOB_COLUMNS).where(*mine)).one_or_none()
    if row is None:
        raise no_such("model", model)
    return as_job(row)


def _check_quota(connection: Connection, project: str, quota: Quota | None) -> None:
    if quota is None or quota.unfinished is None:
        return
    found = connection.scalar(_COUNT_UP_TO, {"of": project, "most": quota.unfinished})
    if found is not None and found >= quota.unfinished:
        raise QuotaError(
            f"the project has {quota.unfinished} unfinished jobs, which is the most it may have",
            hint="wait for one to end, or cancel one",
        )


def _check_files(connection: Connection, new: NewJob) -> None:
    """The files are there, and stay: who deletes one waits for this transaction, and then sees the job."""
    wanted = {name for name in (new.training_file, new.validation_file) if name is not None}
    if not wanted:
        return
    mine = select(files.c.id).where(files.c.id.in_(wanted), files.c.project == new.project)
    if missing := wanted - set(connection.scalars(mine.with_for_update(read=True))):
        raise no_such("file", sorted(missing)[0])
