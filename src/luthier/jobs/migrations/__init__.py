"""The tables' history: each change of them is a revision in `versions`, run by Alembic inside one transaction."""

from __future__ import annotations

from pathlib import Path

from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from alembic.script.revision import RevisionError
from alembic.util import CommandError
from sqlalchemy import Connection

from luthier.errors import DatabaseError

_HERE = Path(__file__).parent


def bring_up_to_date(connection: Connection) -> None:
    """Run the revisions that this database has not seen; the caller holds the lock and commits."""
    context = MigrationContext.configure(connection)
    found = context.get_current_revision()
    script = ScriptDirectory(str(_HERE))
    try:
        missing = list(script.iterate_revisions("head", found or "base"))
    except (CommandError, RevisionError):
        raise DatabaseError(
            f"the database is of a newer Luthier than this one: revision `{found}` is unknown here",
            hint="install the version of Luthier that made it, or a newer one",
        ) from None
    with Operations.context(context):
        for revision in reversed(missing):
            revision.module.upgrade()
    if missing:
        context.stamp(script, "head")
