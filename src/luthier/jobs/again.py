"""Requests that came before: the same one makes no second job."""

from __future__ import annotations

import hashlib

from sqlalchemy import Connection, delete, insert, select

from luthier.errors import IdempotencyError
from luthier.jobs.job import Idempotency
from luthier.jobs.tables import idempotency

KEEP_SECONDS = 24 * 3600.0
RETRY_SECONDS = 600.0
_INSERT = insert(idempotency)


def find(connection: Connection, project: str, asked: Idempotency, now: float) -> int | None:
    """The number of the job that the same request made, if it did.

    With a header, the same header of the same key says so, and another body is an error. Without one, a client that
    counts its retries is believed when the same body came from the same key in the last ten minutes.
    """
    if asked.header is None and not asked.is_retry:
        return None
    mine = select(idempotency.c.job, idempotency.c.body_hash, idempotency.c.created_at).where(
        idempotency.c.project == project, idempotency.c.key == asked.key
    )
    if asked.header is not None:
        row = connection.execute(mine.where(idempotency.c.header == _digest(asked.header))).one_or_none()
        if row is None or now - row.created_at > KEEP_SECONDS:
            return None
        if row.body_hash != asked.body_hash:
            raise IdempotencyError(
                "this idempotency key was used with another request",
                hint="send the same request, or a new key with the new one",
                where="Idempotency-Key",
            )
        return int(row.job)
    same = mine.where(idempotency.c.body_hash == asked.body_hash, idempotency.c.created_at >= now - RETRY_SECONDS)
    row = connection.execute(same.order_by(idempotency.c.number.desc()).limit(1)).one_or_none()
    return None if row is None else int(row.job)


def remember(connection: Connection, project: str, asked: Idempotency, job: int, now: float) -> None:
    """Keep which job a request made, in the transaction that made it."""
    header = None if asked.header is None else _digest(asked.header)
    if header is not None:  # one that is older than a day gives its place
        same = (idempotency.c.project == project, idempotency.c.key == asked.key, idempotency.c.header == header)
        connection.execute(delete(idempotency).where(*same))
    values = {"project": project, "key": asked.key, "header": header, "body_hash": asked.body_hash, "job": job}
    connection.execute(_INSERT, {**values, "created_at": now})


def forget(connection: Connection, now: float) -> None:
    """Drop what is older than a day."""
    connection.execute(delete(idempotency).where(idempotency.c.created_at < now - KEEP_SECONDS))


def _digest(header: str) -> str:
    return hashlib.sha256(header.encode("utf-8", "replace")).hexdigest()
