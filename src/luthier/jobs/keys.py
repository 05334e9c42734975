"""API keys: made once, shown once, kept only as a hash."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import string
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, bindparam, insert, select, update

from luthier.errors import AuthError, CallError, DatabaseError, NotFoundError, StorageError
from luthier.jobs.database import Database
from luthier.jobs.tables import keys, plain

SCOPES = ("read", "submit", "admin")
"""Each reaches as far as those before it, and further."""
_LETTERS = string.digits + string.ascii_letters
_SECRET_LENGTH = 43
_ID_LENGTH = 12
_PREFIX = "tml-"
"""Clients of the Tinker service send no key without it; every other client takes it as it is, with or without."""
_SHAPE = re.compile(rf"(?:{_PREFIX})?ftk_([0-9A-Za-z]{{{_ID_LENGTH}}})_([0-9A-Za-z]{{{_SECRET_LENGTH}}})")
_PROJECT = re.compile(r"[\w.-]{1,64}", re.ASCII)
USE_IS_NOTED_EVERY = 60.0
_NO_HASH = "0" * 64


@dataclass(frozen=True)
class Key:
    """Who asks: the project, and the scopes within it."""

    id: str
    project: str
    scopes: frozenset[str]

    def reaches(self, scope: str) -> bool:
        """Whether the key has this scope, or one that reaches further."""
        return any(each in self.scopes for each in SCOPES[SCOPES.index(scope) :])


@dataclass(frozen=True)
class KeyRow:
    """A key as it is listed. The secret is nowhere."""

    id: str
    project: str
    name: str
    scopes: tuple[str, ...]
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None


_COLUMNS = tuple(keys.c[name] for name in KeyRow.__dataclass_fields__)
_BY_ID = select(keys).where(keys.c.id == bindparam("key"))


def create_key(
    database: Database,
    project: str,
    scopes: Collection[str],
    *,
    name: str = "",
    expires_at: float | None = None,
) -> tuple[KeyRow, str]:
    """A new key, and its text, which is shown now or never."""
    if not scopes or set(scopes) - set(SCOPES):
        found = ", ".join(sorted(set(scopes) - set(SCOPES))) or "none"
        raise CallError(f"the scopes of a key are {', '.join(SCOPES)}, and these were asked for: {found[:80]}")
    if not _PROJECT.fullmatch(project):
        raise CallError(f"a project is 1 to 64 letters, digits, `.`, `_` or `-`, and this is {project[:80]!r}")
    key, secret = _random(_ID_LENGTH), _random(_SECRET_LENGTH)
    given = tuple(each for each in SCOPES if each in scopes)
    row = KeyRow(key, project, plain(name), given, time.time(), expires_at, None, None)
    values = {**vars(row), "scopes": ",".join(given), "sha256": _hash(secret)}
    with database.write() as connection:
        connection.execute(insert(keys).values(values))
    return row, f"{_PREFIX}ftk_{key}_{secret}"


def check_key(database: Database, text: str) -> Key:
    """The key whose text this is; AuthError, in the same words, for one that is wrong, unknown, revoked or expired."""
    shape = _SHAPE.fullmatch(text)
    key, secret = (shape[1], shape[2]) if shape else ("", "")
    with database.read() as connection:
        row = connection.execute(_BY_ID, {"key": key}).one_or_none()
    now = time.time()
    is_same = hmac.compare_digest(_hash(secret), row.sha256 if row else _NO_HASH)
    if row is None or not is_same or row.revoked_at is not None or now >= (row.expires_at or math.inf):
        raise AuthError(
            "the API key is not one of this server's, or does not hold any more",
            hint="`luthier keys create` on the server's machine makes one",
        )
    if abs(now - (row.last_used_at or 0)) >= USE_IS_NOTED_EVERY:
        _note_use(database, row.id, now)
    return Key(row.id, row.project, frozenset(row.scopes.split(",")))


def list_keys(database: Database, project: str | None = None) -> Sequence[KeyRow]:
    """A project's keys, or all, in the order in which they were made."""
    query = select(*_COLUMNS).order_by(keys.c.number)
    if project is not None:
        query = query.where(keys.c.project == project)
    with database.read() as connection:
        return [_as_row(row) for row in connection.execute(query)]


def revoke_key(database: Database, project: str | None, key: str) -> KeyRow:
    """Let a key hold no longer, from this moment on. To revoke one again changes nothing."""
    mine = [keys.c.id == key] if project is None else [keys.c.id == key, keys.c.project == project]
    with database.write() as connection:
        connection.execute(update(keys).where(*mine, keys.c.revoked_at.is_(None)).values(revoked_at=time.time()))
        row = connection.execute(select(*_COLUMNS).where(*mine)).one_or_none()
    if row is None:
        raise NotFoundError(f"there is no key `{key[:80]}`", hint="`luthier keys list` shows them")
    return _as_row(row)


def _note_use(database: Database, key: str, now: float) -> None:
    """Never in the way: a full disk does not keep anybody from reading."""
    with suppress(DatabaseError, StorageError), database.write() as connection:
        connection.execute(update(keys).where(keys.c.id == key).values(last_used_at=now))


def _as_row(row: Row[Any]) -> KeyRow:
    values = dict(row._mapping)
    return KeyRow(**{**values, "scopes": tuple(values["scopes"].split(","))})


def _random(length: int) -> str:
    return "".join(secrets.choice(_LETTERS) for _ in range(length))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
