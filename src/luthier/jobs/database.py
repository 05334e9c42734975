"""The database of a server: SQLite in its home, or PostgreSQL; everything reads and writes through here."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy import exc as sql_errors

from luthier.errors import CallError, DatabaseError, DiskFullError
from luthier.jobs.group_commit import GroupCommit
from luthier.jobs.migrations import bring_up_to_date

FILE = "luthier.db"
_READS_AT_ONCE = 48
_PATIENCE_SECONDS = 10.0
_SQLITE_FULL = ("database or disk is full", "No space left")


class Database:
    """Reads see a snapshot. What a write did is on the disk when its `with` block has ended, or did not happen."""

    def __init__(self, url: str, *, patience: float = _PATIENCE_SECONDS) -> None:
        self.url = _driver_url(url)
        self.is_sqlite = self.url.startswith("sqlite")
        self._patience = patience
        self._engine = _make_engine(self.url, patience)
        self._writing = threading.local()
        self._writer = GroupCommit(self._engine) if self.is_sqlite else None
        self._watch = _Watch(self._engine, self.is_sqlite)

    @classmethod
    def at_home(cls, home: Path) -> Database:
        """The SQLite file in a server's home."""
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        return cls(f"sqlite:///{home / FILE}")

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A connection that sees one state of the database."""
        with _our_errors(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction of its own: all of it, durably, or nothing. It does not nest."""
        if getattr(self._writing, "now", False):
            raise RuntimeError("a write inside a write would wait for itself")
        self._writing.now = True
        try:
            with _our_errors(), self._transaction() as connection:
                yield connection
        finally:
            self._writing.now = False

    def _transaction(self) -> AbstractContextManager[Connection]:
        return self._writer.transaction() if self._writer else self._engine.begin()

    def lock(self, connection: Connection, name: str) -> None:
        """Hold a name until the transaction ends. SQLite has one writer, who holds every name already."""
        if not self.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": name})

    def migrate(self) -> None:
        """Bring the tables up to date; of two processes that start at once, one waits for the other."""
        with self.write() as connection:
            self.lock(connection, "luthier migrations")
            bring_up_to_date(connection)

    def change_mark(self) -> str:
        """Differs from an earlier mark when anything was committed since. Cheap enough to ask ten times a second."""
        with _our_errors():
            return self._watch.mark()

    def check_writable(self) -> None:
        """Raise DatabaseError or DiskFullError unless a write reaches the disk."""
        with self.write() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = version_num"))

    def close(self) -> None:
        """Let go of every connection."""
        self._watch.close()
        self._engine.dispose()


class _Watch:
    """What tells that somebody committed: SQLite counts it, PostgreSQL shows which transactions are under way."""

    def __init__(self, engine: Engine, is_sqlite: bool) -> None:
        self._engine = engine
        self._question = text("PRAGMA data_version" if is_sqlite else "SELECT pg_current_snapshot()::text")
        self._connection: Connection | None = None
        self._lock = threading.Lock()

    def mark(self) -> str:
        with self._lock:
            # SQLite counts for one connection what the others committed, so it is always the same one.
            if self._connection is None:
                self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            try:
                return str(self._connection.scalar(self._question))
            except sql_errors.SQLAlchemyError:
                self._drop()
                raise

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None


def _driver_url(url: str) -> str:
    if url.startswith("sqlite:///"):
        return url
    scheme, colon, rest = url.partition("://")
    if colon and scheme in ("postgresql", "postgres", "postgresql+psycopg"):
        return f"postgresql+psycopg://{rest}"
    raise CallError(
        f"a database is `sqlite:///FILE` or `postgresql://USER@HOST/NAME`, and this begins with `{scheme[:20]}`",
        where="--database",
    )


def _make_engine(url: str, patience: float) -> Engine:
    pool: dict[str, Any] = {"pool_size": _READS_AT_ONCE, "max_overflow": _READS_AT_ONCE, "pool_timeout": patience}
    if url.startswith("sqlite"):
        engine = create_engine(url, connect_args={"check_same_thread": False, "timeout": patience}, **pool)
        event.listen(engine, "connect", _prepare_sqlite)
        return engine
    arguments = {"connect_timeout": max(2, int(patience))}
    engine = create_engine(make_url(url), connect_args=arguments, pool_pre_ping=True, **pool)
    event.listen(engine, "connect", _prepare_postgres)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves; see GroupCommit
    for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "temp_store = MEMORY"):
        connection.execute(f"PRAGMA {setting}")


def _prepare_postgres(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET lock_timeout = '10s'")
        cursor.execute("SET idle_in_transaction_session_timeout = '60s'")
    connection.commit()


@contextmanager
def _our_errors() -> Iterator[None]:
    """What a driver says of a database that is away, busy or full, as errors of ours."""
    try:
        yield
    except (sql_errors.OperationalError, sql_errors.InterfaceError, sql_errors.TimeoutError) as error:
        raise _translate(error) from error
    except sql_errors.DBAPIError as error:
        if error.connection_invalidated:
            raise _translate(error) from error
        raise


def _translate(error: Exception) -> Exception:
    words = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
    if any(full in words for full in _SQLITE_FULL):
        return DiskFullError(
            f"the database could not write: {words}; what was there before is untouched",
            hint="free some space on the disk of the server's home; no restart is needed",
        )
    return DatabaseError(
        f"the database did not do it: {words}",
        hint="nothing was written; ask again in a second, and see the server's log if it goes on",
    )
