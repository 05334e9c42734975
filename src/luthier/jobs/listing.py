"""Pages of jobs, models and events: by number, never by counting over what came before."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import orjson
from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    FromClause,
    Integer,
    Select,
    String,
    and_,
    bindparam,
    cast,
    func,
    literal,
    select,
    tuple_,
    type_coerce,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB

from luthier.jobs.job import Job, JobEvent, State, WorkerRow
from luthier.jobs.rows import (
    EVENT_COLUMNS,
    JOB_COLUMNS,
    WORKER_COLUMNS,
    Page,
    as_event,
    as_job,
    as_page,
    as_worker,
    no_such,
)
from luthier.jobs.tables import events, jobs, workers

_NO_SEQ = 2**62


def _after_pairs(pairs: FromClause, job: ColumnElement[Any], seq: ColumnElement[Any]) -> Select[Any]:
    """Events by pairs of a job and a number, given as one parameter: each pair is one search in the table."""
    follows = and_(events.c.job == job, events.c.seq > seq)
    found = select(events.c.job, *EVENT_COLUMNS).select_from(pairs).join(events, follows)
    return found.order_by(events.c.job, events.c.seq)


_SQLITE_PAIR = func.json_each(bindparam("wanted", type_=String)).table_valued("value", name="pair")
_POSTGRES_PAIR = func.jsonb_array_elements(cast(bindparam("wanted", type_=String), JSONB)).table_valued("value")
_AFTER = {
    "sqlite": _after_pairs(
        _SQLITE_PAIR,
        func.json_extract(_SQLITE_PAIR.c.value, "$[0]"),
        func.json_extract(_SQLITE_PAIR.c.value, "$[1]"),
    ),
    "postgresql": _after_pairs(
        _POSTGRES_PAIR,
        cast(_POSTGRES_PAIR.c.value.op("->>")(literal(0, Integer)), BigInteger),
        cast(_POSTGRES_PAIR.c.value.op("->>")(literal(1, Integer)), BigInteger),
    ),
}


def list_jobs(
    connection: Connection,
    project: str,
    *,
    after: str | None,
    limit: int,
    states: Collection[State] | None,
    metadata: Mapping[str, str] | None,
    without_metadata: bool,
    dialects: Collection[str] | None,
    newest_first: bool,
) -> Page[Job]:
    """Jobs of a project, in the order in which they were created."""
    query = select(*JOB_COLUMNS).where(jobs.c.project == project)
    if states is not None:
        query = query.where(jobs.c.state.in_([str(state) for state in states]))
    if dialects is not None:
        query = query.where(jobs.c.dialect.in_(dialects))
    if without_metadata:
        query = query.where(type_coerce(jobs.c.metadata, String) == "{}")
    for key, value in (metadata or {}).items():
        query = query.where(_has(connection, key, value))
    return _page_of_jobs(connection, query, project, jobs.c.id, after, limit, newest_first)


def list_models(connection: Connection, project: str, *, after: str | None, limit: int) -> Page[Job]:
    """Jobs of a project with a result that was not deleted, the newest first."""
    mine = (jobs.c.project == project, jobs.c.model.is_not(None), jobs.c.model_deleted_at.is_(None))
    return _page_of_jobs(connection, select(*JOB_COLUMNS).where(*mine), project, jobs.c.model, after, limit, True)


def list_workers(connection: Connection) -> list[WorkerRow]:
    """The workers that were not given up."""
    return [as_worker(row) for row in connection.execute(select(*WORKER_COLUMNS).order_by(workers.c.id))]


def new_events(connection: Connection, seen: Mapping[str, int]) -> dict[str, list[JobEvent]]:
    """The events after the number seen of each of many jobs, by the id of the job."""
    query = select(jobs.c.id, jobs.c.number, jobs.c.last_seq).where(jobs.c.id.in_(list(seen)))
    ahead = {row.number: row.id for row in connection.execute(query) if row.last_seq > seen[row.id]}
    found: dict[str, list[JobEvent]] = {}
    if ahead:
        wanted = orjson.dumps([[number, seen[job]] for number, job in ahead.items()]).decode()
        for row in connection.execute(_AFTER[connection.dialect.name], {"wanted": wanted}):
            found.setdefault(ahead[row[0]], []).append(JobEvent(*row[1:]))
    return found


def list_events(
    connection: Connection,
    job: int,
    *,
    after_seq: int,
    limit: int,
    newest_first: bool,
    before_seq: int | None,
    kinds: Collection[str] | None,
    after_step: int | None,
) -> Page[JobEvent]:
    """Events of a job. Each kind is asked for by itself, so that an index gives each answer in order."""
    if kinds is None and after_step is not None:
        raise ValueError("after_step needs kinds")
    if kinds is not None and not kinds:
        return Page([], False)
    order = ("seq",) if after_step is None else ("step", "seq")
    query = select(*EVENT_COLUMNS).where(events.c.job == job)
    span = (after_seq, _NO_SEQ if before_seq is None else before_seq)
    if kinds is None:
        query = query.where(events.c.seq > span[0], events.c.seq < span[1])
    else:
        of_each = [_of_kind(query, kind, span, after_step) for kind in sorted(set(kinds))]
        parts = [_in_order(each, ("kind", *order), newest_first, limit).subquery() for each in of_each]
        query = select(union_all(*(select(part) for part in parts)).subquery())
    rows = connection.execute(_in_order(query, order, newest_first, limit))
    return as_page([as_event(row) for row in rows], limit)


def _of_kind(query: Select[Any], kind: str, span: tuple[int, int], after_step: int | None) -> Select[Any]:
    if after_step is not None:
        later = (events.c.step.is_not(None), events.c.step > after_step)
        return query.where(events.c.kind == kind, *later, events.c.seq > span[0], events.c.seq < span[1])
    # As pairs with the kind: else SQLite reads the job from its start and skips what is of other kinds.
    pair = tuple_(events.c.kind, events.c.seq)
    return query.where(pair > tuple_(kind, span[0]), pair < tuple_(kind, span[1]))


def _in_order(query: Select[Any], names: Sequence[str], newest_first: bool, limit: int) -> Select[Any]:
    columns = [query.selected_columns[name] for name in names]
    return query.order_by(*(each.desc() if newest_first else each for each in columns)).limit(limit + 1)


def _page_of_jobs(
    connection: Connection,
    query: Select[Any],
    project: str,
    cursor: Column[Any],
    after: str | None,
    limit: int,
    newest_first: bool,
) -> Page[Job]:
    if after is not None:
        seen = connection.scalar(select(jobs.c.number).where(jobs.c.project == project, cursor == after))
        if seen is None:
            raise no_such("job" if cursor is jobs.c.id else "model", after)
        query = query.where(jobs.c.number < seen if newest_first else jobs.c.number > seen)
    query = query.order_by(jobs.c.number.desc() if newest_first else jobs.c.number).limit(limit + 1)
    return as_page([as_job(row) for row in connection.execute(query)], limit)


def _has(connection: Connection, key: str, value: str) -> ColumnElement[bool]:
    """Whether the metadata hold this value under this key."""
    if connection.dialect.name == "sqlite":
        pairs = func.json_each(type_coerce(jobs.c.metadata, String)).table_valued("key", "value", name="pair")
        return select(literal(1)).select_from(pairs).where(pairs.c.key == key, pairs.c.value == value).exists()
    return type_coerce(cast(type_coerce(jobs.c.metadata, String), JSONB)[key].astext, String) == value
