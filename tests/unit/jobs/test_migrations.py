"""What a database held before its tables changed is there afterwards."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import MetaData, inspect, select, text

from luthier.jobs.database import Database
from luthier.jobs.job import NewJob, State
from luthier.jobs.keys import create_key, list_keys
from luthier.jobs.store import JobStore
from luthier.jobs.tables import metadata

FIRST = "luthier.jobs.migrations.versions.v0001_first_tables"


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Database]:
    """A database as the first version made it."""
    database = Database.at_home(tmp_path)
    with database.write() as connection:
        context = MigrationContext.configure(connection)
        with Operations.context(context):
            importlib.import_module(FIRST).upgrade()
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('v0001')"))
    yield database
    database.close()


def test_jobs_and_keys_of_the_first_version_survive(old: Database, tmp_path: Path) -> None:
    store = JobStore(old, tmp_path)
    key, _ = create_key(old, "anna", ["submit"], name="laptop")
    job, _ = store.create(NewJob("anna", "own", {"model": {"base": "practice"}}, metadata={"a": "b"}))
    before = rows_of(old)
    old.migrate()
    after = rows_of(old)
    assert {name: after[name] for name in before if name != "alembic_version"} == {
        name: before[name] for name in before if name != "alembic_version"
    }
    with old.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    assert [each.id for each in list_keys(old)] == [key.id]
    assert store.find("anna", job.id) == job
    assert store.cancel("anna", job.id).state is State.CANCELLED, "its rules still hold, and let through what they did"


def rows_of(database: Database) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every table."""
    with database.read() as connection:
        found = MetaData()
        found.reflect(connection)
        assert inspect(connection).get_table_names()
        return {
            name: sorted(tuple(row) for row in connection.execute(select(table)))
            for name, table in found.tables.items()
        }
