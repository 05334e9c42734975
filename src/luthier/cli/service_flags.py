"""Flags that the commands of a server share: its home, its database, its models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from luthier.jobs.database import Database

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

DATABASE_VARIABLE = "LUTHIER_DATABASE"


def home_flags(function: Decorated) -> Decorated:
    """`--home` and `--database`."""
    for option in (
        click.option(
            "--database",
            metavar="URL",
            envvar=DATABASE_VARIABLE,
            help=f"sqlite:///FILE or postgresql://...; {DATABASE_VARIABLE} keeps a password off the command line. "
            "When absent, luthier.db in the home.",
        ),
        click.option(
            "--home",
            metavar="DIR",
            type=click.Path(file_okay=False, path_type=Path),
            help="Folder of the server: files, runs and its database. When absent, `server` in LUTHIER_HOME.",
        ),
    ):
        function = option(function)
    return function


def find_home(home: Path | None) -> Path:
    """The folder of the server, made where it is not there yet."""
    from luthier.runs.home import luthier_home

    found = (home or luthier_home() / "server").expanduser().absolute()
    found.mkdir(parents=True, exist_ok=True, mode=0o700)
    return found


def database_url(home: Path, given: str | None) -> str:
    """The address of the database: as given, or the file in the home."""
    return given or f"sqlite:///{home / 'luthier.db'}"


def open_database(home: Path, given: str | None) -> Database:
    """The database, up to date; MissingExtraError where the packages of a server are not installed."""
    from luthier.extras import import_extra

    import_extra("sqlalchemy", "server")
    import_extra("alembic", "server")
    from luthier.jobs.database import Database

    database = Database(database_url(home, given))
    database.migrate()
    return database
