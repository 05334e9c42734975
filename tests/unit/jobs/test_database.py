"""Reads and writes: durable, whole, grouped, in order of arrival; and what a database that is away looks like."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from itertools import product
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import exc, func, insert, select, text, update

from luthier.errors import CallError, DatabaseError, DiskFullError
from luthier.jobs.database import Database
from luthier.jobs.group_commit import GroupCommit
from luthier.jobs.job import FOLLOWS, State
from luthier.jobs.store import JobStore
from luthier.jobs.tables import events, jobs, metadata, workers
from tests.unit.jobs.conftest import new_job

WORKER = {"machine": "m", "capacity": {}, "free": {}, "versions": {}, "beats": 1, "started_at": 0.0, "seen_at": 0.0}


def add(database: Database, name: str) -> None:
    with database.write() as connection:
        connection.execute(insert(workers).values(id=name, **WORKER))


def names(database: Database) -> set[str]:
    with database.read() as connection:
        return set(connection.scalars(select(workers.c.id)))


def test_the_migrations_make_exactly_the_tables(database: Database) -> None:
    database.migrate()  # a second time does nothing
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_database_of_a_newer_version_is_refused(database: Database) -> None:
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'v9999'"))
    with pytest.raises(DatabaseError, match="newer Luthier"):
        database.migrate()


def test_two_processes_that_start_at_once_migrate_once(home: Path) -> None:
    script = "import sys; from pathlib import Path; from luthier.jobs.database import Database\n"
    script += "sys.stdin.readline(); Database.at_home(Path(sys.argv[1])).migrate()"
    call = [sys.executable, "-c", script, str(home)]
    started = [subprocess.Popen(call, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for each in started:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    assert [each.communicate()[1] for each in started] == ["", ""]
    database = Database.at_home(home)
    with database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(text("alembic_version"))) == 1
    database.close()


def test_sqlite_is_set_to_keep_what_it_acknowledged(home: Path) -> None:
    database = Database.at_home(home)
    with database.read() as connection:
        settings = [
            connection.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert settings == ["wal", 2, 1]
    database.close()


def test_a_write_is_whole_or_not_there(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.write() as connection:
        _ = connection.execute(insert(workers).values(id="half", **WORKER)), 1 / 0
    add(database, "whole")
    assert names(database) == {"whole"}


def test_a_write_inside_a_write_is_refused_at_once(database: Database) -> None:
    with database.write(), pytest.raises(RuntimeError), database.write():
        pass
    add(database, "after")
    assert names(database) == {"after"}


def test_writers_that_wait_share_a_commit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first holds its turn until all others wait; so there are two commits for nine writes, one of which fails."""
    database = Database.at_home(home)
    database.migrate()
    writer = database._writer
    assert writer is not None
    ended: list[int] = []
    end = GroupCommit._end
    monkeypatch.setattr(GroupCommit, "_end", lambda self, group: (ended.append(group.size), end(self, group))[1])
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            with database.write() as connection:
                connection.execute(insert(workers).values(id=str(number), **WORKER))
                if number == 5:
                    raise ZeroDivisionError
        except ZeroDivisionError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    with database.write() as connection:
        connection.execute(insert(workers).values(id="first", **WORKER))
        for thread in threads:
            thread.start()
        while writer._waiting < len(threads):
            pass
    for thread in threads:
        thread.join()
    assert names(database) == {"first", "0", "1", "2", "3", "4", "6", "7"}
    assert len(failures) == 1
    assert ended == [8]
    database.close()


def test_a_commit_that_fails_fails_all_that_are_in_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database.at_home(home)
    database.migrate()
    writer = database._writer
    assert writer is not None
    end = GroupCommit._end

    def break_it(self: GroupCommit, group: object) -> None:
        group.connection.exec_driver_sql("ROLLBACK")  # type: ignore[attr-defined]
        end(self, group)  # type: ignore[arg-type]

    monkeypatch.setattr(GroupCommit, "_end", break_it)
    failures: list[Exception] = []

    def write(name: str) -> None:
        try:
            add(database, name)
        except DatabaseError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    with writer._turn:
        for thread in threads:
            thread.start()
        while writer._waiting < len(threads):
            pass
    for thread in threads:
        thread.join()
    assert len(failures) == 3
    assert names(database) == set()
    database.close()


def test_whoever_waits_for_a_commit_that_nobody_makes_makes_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.jobs.group_commit._PATIENCE_SECONDS", 0.02)
    database = Database.at_home(home)
    database.migrate()
    assert database._writer is not None
    database._writer._waiting = 1  # one that was interrupted and never comes
    add(database, "alone")
    assert names(database) == {"alone"}
    database.close()


def test_another_process_that_writes_too_long_is_an_error_of_ours(home: Path) -> None:
    database = Database(f"sqlite:///{home / 'luthier.db'}", patience=0.05)
    database.migrate()
    other = sqlite3.connect(home / "luthier.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseError, match="locked") as caught:
        add(database, "late")
    assert caught.value.code == "database_unavailable"
    assert names(database) == set()  # reading goes on
    other.execute("ROLLBACK")
    other.close()
    add(database, "in time")
    database.close()


def test_a_full_disk_fails_the_write_and_nothing_else(home: Path) -> None:
    """SQLite is told that the disk ends where the file does; it says so in the words of a full disk."""
    database = Database.at_home(home)
    database.migrate()
    full = JobStore(database, home)
    kept, _ = full.create(new_job())
    with database.write() as connection:
        pages = connection.scalar(text("PRAGMA page_count"))
        connection.execute(text(f"PRAGMA max_page_count = {pages}"))
    big = new_job(request={"text": "x" * 100_000})
    with pytest.raises(DiskFullError) as caught:
        full.create(big)
    assert caught.value.code == "disk_full"
    assert full.find("anna", kept.id) == kept
    with database.write() as connection:
        connection.execute(text("PRAGMA max_page_count = 1000000"))
    assert full.create(big)[1] is False
    database.close()


@pytest.mark.parametrize("url", ["mysql://x/y", "luthier.db", "sqlite://", "postgresql+asyncpg://x/y"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(CallError, match="sqlite:///FILE"):
        Database(url)


def test_a_mark_changes_with_every_commit_and_only_then(database: Database) -> None:
    before = database.change_mark()
    names(database)
    assert database.change_mark() == before
    for name in "abc":
        add(database, name)
        after = database.change_mark()
        assert after != before
        before = after


def test_a_mark_changes_when_another_process_commits(home: Path) -> None:
    mine, others = Database.at_home(home), Database.at_home(home)
    mine.migrate()
    before = mine.change_mark()
    add(others, "theirs")
    assert mine.change_mark() != before
    mine.close()
    others.close()


def test_text_that_a_database_refuses_is_replaced(database: Database, store: JobStore) -> None:
    hostile = "a\x00b\ud800c \U0001f600"
    job, _ = store.create(
        new_job(suffix=hostile, metadata={hostile: hostile}, request={"deep": [{"x": hostile, "n": 2**70, "f": 1e999}]})
    )
    found = store.find("anna", job.id)
    assert found.suffix == "a\ufffdb?c \U0001f600"
    assert found.metadata == {found.suffix: found.suffix}
    assert found.request == {"deep": [{"x": found.suffix, "n": str(2**70), "f": None}]}
    assert store.list_jobs("anna", metadata={found.suffix: found.suffix}).items == [found]


def test_no_sql_takes_a_job_where_the_rules_do_not(database: Database, store: JobStore) -> None:
    """All 81 pairs of states, written past our code."""
    refused, taken = set(), set()
    for before, after in product(State, State):
        job, _ = store.create(new_job())
        with database.write() as connection:
            for state in _path_to(before):
                connection.execute(update(jobs).where(jobs.c.id == job.id).values(state=str(state)))
        try:
            with database.write() as connection:
                connection.execute(update(jobs).where(jobs.c.id == job.id).values(state=str(after)))
            taken.add((before, after))
        except exc.IntegrityError:
            refused.add((before, after))
    assert taken == {(before, after) for before in State for after in {before, *FOLLOWS[before]}}
    assert len(taken) + len(refused) == 81


@pytest.mark.parametrize("column", ["model", "error_code", "error_message", "finished_at", "attempt", "last_seq"])
def test_no_sql_changes_a_job_that_has_ended(database: Database, store: JobStore, column: str) -> None:
    job, _ = store.create(new_job())
    store.cancel("anna", job.id)
    other = "9" if column in ("model", "error_code", "error_message") else 9
    with pytest.raises(exc.IntegrityError), database.write() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job.id).values({column: other}))


def test_no_sql_makes_a_state_of_its_own(database: Database, store: JobStore) -> None:
    job, _ = store.create(new_job())
    with pytest.raises(exc.IntegrityError), database.write() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job.id).values(state="done"))


def test_events_are_gone_with_their_job(database: Database, store: JobStore) -> None:
    job, _ = store.create(new_job())
    store.cancel("anna", job.id)
    store.delete("anna", job.id)
    with database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(events)) == 0


def _path_to(state: State) -> list[State]:
    """The states that lead from VALIDATING to this one."""
    paths = {State.VALIDATING: [State.VALIDATING]}
    waiting = [State.VALIDATING]
    while waiting:
        here = waiting.pop(0)
        for follower in sorted(FOLLOWS[here] - set(paths)):
            paths[follower] = [*paths[here], follower]
            waiting.append(follower)
    return paths[state][1:]


def test_the_server_answers_at_once_that_a_database_is_not_there() -> None:
    nowhere = Database(f"postgresql://nobody@/none?host={os.sep}nowhere", patience=2)
    with pytest.raises(DatabaseError), nowhere.read():
        pass
    nowhere.close()
