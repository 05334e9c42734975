"""Rows as what the rest of the package sees, and a page of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from sqlalchemy import Connection, select

from luthier.errors import NotFoundError
from luthier.jobs.job import Attempt, Job, JobEvent, Model, State, WorkerRow
from luthier.jobs.tables import attempts, events, jobs, workers

T = TypeVar("T")

_JOB_FIELDS = tuple(each.name for each in fields(Job))
_STATE = _JOB_FIELDS.index("state")
JOB_COLUMNS = tuple(jobs.c[name] for name in _JOB_FIELDS)
LOCKED_COLUMNS = (*JOB_COLUMNS, jobs.c.number, jobs.c.holder, jobs.c.relayed)
EVENT_COLUMNS = tuple(events.c[each.name] for each in fields(JobEvent))
WORKER_COLUMNS = tuple(workers.c[each.name] for each in fields(WorkerRow))
ATTEMPT_COLUMNS = tuple(jobs.c.id if each.name == "job" else attempts.c[each.name] for each in fields(Attempt))


@dataclass(frozen=True)
class Page(Generic[T]):
    """Some of a list, in order, and whether more follow."""

    items: Sequence[T]
    has_more: bool


def as_page(found: Sequence[T], limit: int) -> Page[T]:
    """A page of what was asked for with a limit of one more."""
    return Page(found[:limit], len(found) > limit)


def as_job(row: Sequence[Any]) -> Job:
    """A row of JOB_COLUMNS or LOCKED_COLUMNS."""
    values = list(row[: len(_JOB_FIELDS)])
    values[_STATE] = State(values[_STATE])
    return Job(*values)


def as_event(row: Sequence[Any]) -> JobEvent:
    """A row of EVENT_COLUMNS."""
    return JobEvent(*row)


def as_attempt(row: Sequence[Any]) -> Attempt:
    """A row of ATTEMPT_COLUMNS."""
    return Attempt(*row)


def as_worker(row: Sequence[Any]) -> WorkerRow:
    """A row of WORKER_COLUMNS."""
    return WorkerRow(*row)


def as_model(job: Job) -> Model:
    """The result of a job that succeeded."""
    assert job.model is not None
    return Model(job.model, job.base, job.id, job.project, job.finished_at or job.updated_at)


def no_such(what: str, name: str) -> NotFoundError:
    """The same words whether there is none or it is another project's."""
    return NotFoundError(f"there is no {what} `{name[:200]}`", where=name[:200])


def number_of(connection: Connection, project: str, job: str) -> int:
    """The number under which a job's events and attempts are kept; NotFoundError when it is not this project's."""
    number = connection.scalar(select(jobs.c.number).where(jobs.c.id == job, jobs.c.project == project))
    if number is None:
        raise no_such("job", job)
    return int(number)
