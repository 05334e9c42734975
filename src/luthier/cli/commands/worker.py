"""`luthier worker`: a worker alone, beside or far from the server that it works for."""

from __future__ import annotations

import os
from pathlib import Path

import click

from luthier.cli.output import Command
from luthier.cli.service_flags import DATABASE_VARIABLE, find_home, home_flags


@click.command("worker", cls=Command)
@home_flags
@click.option(
    "--server-database", metavar="URL", help="The same as --database: the database of the server that it works for."
)
@click.option(
    "--models",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder laid out org/name; names of models lead there first.",
)
@click.option("--slots", type=click.IntRange(1, 64), help="Jobs at once; when absent, one per accelerator, or one.")
@click.option("--most-running", type=click.IntRange(min=1), help="Jobs of one project at once.")
@click.option(
    "--offer", "offers", multiple=True, metavar="KIND=KIND", help="Accept one kind of accelerator as another: H100=cpu."
)
def command(
    home: Path | None,
    database: str | None,
    server_database: str | None,
    models: Path | None,
    slots: int | None,
    most_running: int | None,
    offers: tuple[str, ...],
    as_json: bool,
) -> None:
    """Take jobs from a server's database and train them; SIGTERM ends the worker, and its trainers go on.

    It shares the server's home, as a folder of its own machine or over the network.
    """
    from luthier.errors import CallError
    from luthier.extras import import_extra

    import_extra("sqlalchemy", "server")
    if database and server_database and database != server_database:
        raise CallError("--database and --server-database name two databases", hint="give one of them")
    if url := server_database or database:
        os.environ[DATABASE_VARIABLE] = url  # not an argument: everybody on the machine could read it
    from luthier.jobs.worker import main

    given = ["--home", str(find_home(home))]
    given += ["--models", str(models.absolute())] if models else []
    given += ["--slots", str(slots)] if slots else []
    given += ["--most-running", str(most_running)] if most_running else []
    for each in offers:
        given += ["--offer", each]
    if code := main(given):
        raise SystemExit(code)
