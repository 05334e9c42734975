"""How a job changes its state: by the rules of `FOLLOWS`, its row and the event about it in one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update
from sqlalchemy.sql.elements import ColumnElement

from luthier.errors import ConflictError
from luthier.jobs.job import FINAL, FOLLOWS, NewEvent, State
from luthier.jobs.rows import LOCKED_COLUMNS
from luthier.jobs.tables import attempts, events, jobs

_TICK = 1e-6
_INSERT = insert(events)
_WORDS: Mapping[State, str] = {
    State.VALIDATING: "The files are being checked",
    State.QUEUED: "The job waits for a worker",
    State.RUNNING: "A worker has begun",
    State.PAUSING: "The job was asked to pause: it saves a checkpoint and stops",
    State.PAUSED: "The job is paused",
    State.CANCELLING: "The job was asked to stop for good",
    State.SUCCEEDED: "The job has succeeded",
    State.FAILED: "The job has failed",
    State.CANCELLED: "The job was cancelled",
}


def lock_job(connection: Connection, *conditions: ColumnElement[bool]) -> Row[Any] | None:
    """The row of one job, which nobody else changes until the transaction ends."""
    return connection.execute(select(*LOCKED_COLUMNS).where(*conditions).with_for_update(of=jobs)).one_or_none()


def move(
    connection: Connection,
    row: Row[Any],
    *states: State,
    now: float,
    message: str = "",
    before: Sequence[NewEvent] = (),
    data: Mapping[str, Any] | None = None,
    **changes: Any,
) -> None:
    """Take a locked job to a state, by way of the others named, with an event for each; `before` come first."""
    found = State(row.state)
    written = list(before)
    for state in states:
        if state not in FOLLOWS[found]:
            raise ConflictError(f"the job is {found} and cannot become {state}", where=row.id)
        level = "error" if state == State.FAILED else "info"
        facts = {"from": str(found), "to": str(state), **(data or {})}
        words = message if message and state == states[-1] else _WORDS[state]
        written.append(NewEvent("state_changed", words, level, data=facts))
        if state != states[-1]:
            connection.execute(update(jobs).where(jobs.c.number == row.number).values(state=str(state)))
        found = state
    if found in FINAL:
        changes["finished_at"] = max(now, row.created_at)
    change(connection, row, written, now, state=str(found), updated_at=max(now, row.updated_at + _TICK), **changes)


def change(connection: Connection, row: Row[Any], new: Sequence[NewEvent], now: float, **changes: Any) -> None:
    """Write columns of a locked job, and events that follow on its last."""
    changes["last_seq"] = row.last_seq + len(new)
    connection.execute(update(jobs).where(jobs.c.number == row.number).values(changes))
    write_events(connection, row.number, row.project, row.last_seq, new, now)


def write_events(
    connection: Connection, number: int, project: str, last_seq: int, new: Sequence[NewEvent], now: float
) -> None:
    """Number the events from the last one on. The caller holds the job's row and writes its `last_seq`."""
    if not new:
        return
    rows = [
        {
            "job": number,
            "seq": last_seq + place,
            "project": project,
            "created_at": now if each.created_at is None else each.created_at,
            "level": each.level,
            "kind": each.kind,
            "message": each.message,
            "step": each.step,
            "data": each.data,
        }
        for place, each in enumerate(new, start=1)
    ]
    connection.execute(_INSERT, rows)


def end_attempt(
    connection: Connection, row: Row[Any], ending: str, now: float, *, error_code: str | None = None, message: str = ""
) -> None:
    """End the attempt that holds a locked job, if one does; the caller takes `holder` from the job."""
    if row.holder is None:
        return
    held = (attempts.c.job == row.number) & (attempts.c.number == row.attempt) & attempts.c.ended_at.is_(None)
    values = {"ended_at": now, "ending": ending, "error_code": error_code, "message": message}
    connection.execute(update(attempts).where(held).values(values))
