"""`luthier keys`: who may use a server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from luthier.cli.output import Group, print_json, print_table, say, warn
from luthier.cli.service_flags import find_home, home_flags, open_database

if TYPE_CHECKING:
    from luthier.jobs.keys import KeyRow

_DAY = 86400.0


@click.group("keys", cls=Group)
def command() -> None:
    """Create, list and revoke the keys of a server, on its own machine; it may be running meanwhile."""


@command.command("create")
@home_flags
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(["read", "submit", "admin"]),
    multiple=True,
    default=("submit",),
    show_default=True,
    help="What the key may: read what is there, submit as well, or administer as well.",
)
@click.option("--project", default="default", show_default=True, help="Whose jobs and files the key sees.")
@click.option("--name", default="", help="Says what the key is for.")
@click.option("--expires-days", type=click.FloatRange(min=0, min_open=True), help="The key ends after so many days.")
def create(
    home: Path | None,
    database: str | None,
    scopes: tuple[str, ...],
    project: str,
    name: str,
    expires_days: float | None,
    as_json: bool,
) -> None:
    """Create a key, and print it this once."""
    from luthier.jobs.keys import create_key

    opened = open_database(find_home(home), database)
    expires_at = None if expires_days is None else time.time() + expires_days * _DAY
    row, text = create_key(opened, project, scopes, name=name, expires_at=expires_at)
    if as_json:
        shown = {"key": text, "id": row.id, "project": row.project, "scopes": list(row.scopes)}
        print_json({**shown, "name": row.name, "expires_at": row.expires_at})
        return
    say(text)
    warn("it is shown this once, and kept only as a hash")


@command.command("list")
@home_flags
@click.option("--project", help="Only the keys of this project.")
def list_command(home: Path | None, database: str | None, project: str | None, as_json: bool) -> None:
    """List the keys, without their secrets."""
    from luthier.jobs.keys import list_keys

    found = list_keys(open_database(find_home(home), database), project)
    if as_json:
        print_json({"keys": [{**vars(row), "scopes": list(row.scopes)} for row in found]})
        return
    if not found:
        say("no keys yet: `luthier keys create` makes one")
        return
    rows = [
        (each.id, each.project, ",".join(each.scopes), _day(each.created_at), _state(each), each.name) for each in found
    ]
    print_table([("id", "project", "scopes", "made", "state", "name"), *rows], indent="")


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(at))


def _state(row: KeyRow) -> str:
    if row.revoked_at is not None:
        return "revoked"
    if row.expires_at is None:
        return "good"
    return f"until {_day(row.expires_at)}" if row.expires_at > time.time() else "expired"


@command.command("revoke")
@click.argument("id")
@home_flags
def revoke(id: str, home: Path | None, database: str | None, as_json: bool) -> None:
    """Revoke a key by its id: within a second it opens nothing any more."""
    from luthier.jobs.keys import revoke_key

    revoke_key(open_database(find_home(home), database), None, id)
    if as_json:
        print_json({"id": id, "revoked": True})
        return
    say(f"{id} is revoked")
