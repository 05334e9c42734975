"""Many threads' writes to SQLite in one commit: the disk is asked to sync once for all that wait, not once for each.

One thread writes at a time, each inside a savepoint of its own. A thread that is done and sees others waiting leaves
the transaction open for them and waits for the commit of the last; every one returns only after that commit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine

_MOST_IN_A_GROUP = 64
_PATIENCE_SECONDS = 0.5


class _Group:
    """An open transaction, and those whose writes are in it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.size = 0
        self.ended = threading.Event()
        self.failure: BaseException | None = None


class GroupCommit:
    """The one writer of a process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turn = threading.Lock()
        self._counting = threading.Lock()
        self._waiting = 0
        self._group: _Group | None = None

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A savepoint in the open transaction; on return it is committed, by this thread or by another."""
        self._take_turn()
        try:
            group = self._group or self._open()
            with self._savepoint(group) as connection:
                yield connection
        finally:
            self._pass_on()
            self._turn.release()
        self._wait_for(group)

    def _take_turn(self) -> None:
        with self._counting:
            self._waiting += 1
        try:
            self._turn.acquire()
        finally:
            with self._counting:
                self._waiting -= 1

    def _open(self) -> _Group:
        connection = self._engine.connect()
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        except BaseException:
            connection.close()
            raise
        self._group = _Group(connection)
        return self._group

    @contextmanager
    def _savepoint(self, group: _Group) -> Iterator[Connection]:
        group.connection.exec_driver_sql("SAVEPOINT one")
        try:
            yield group.connection
            group.connection.exec_driver_sql("RELEASE one")
        except BaseException as error:
            self._undo(group, error)
            raise
        group.size += 1

    def _undo(self, group: _Group, error: BaseException) -> None:
        """Take back this thread's part; where SQLite has already taken back all (disk full), all have failed."""
        try:
            group.connection.exec_driver_sql("ROLLBACK TO one")
            group.connection.exec_driver_sql("RELEASE one")
        except Exception:
            group.failure = error
            self._end(group)

    def _pass_on(self) -> None:
        group = self._group
        if group is None:
            return
        with self._counting:
            others = self._waiting
        if others == 0 or group.size >= _MOST_IN_A_GROUP:
            self._end(group)

    def _end(self, group: _Group) -> None:
        self._group = None
        try:
            if group.failure is None:
                group.connection.exec_driver_sql("COMMIT")
        except BaseException as error:
            group.failure = error
        finally:
            group.connection.close()  # a transaction that is still open is rolled back
            group.ended.set()

    def _wait_for(self, group: _Group) -> None:
        while not group.ended.wait(_PATIENCE_SECONDS):
            # Whoever was to commit was interrupted on the way here; then this thread does it.
            with self._turn:
                if self._group is group:
                    self._end(group)
        if group.failure is not None:
            raise group.failure
