"""`luthier serve`: the job service on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from luthier.cli.output import Command, print_json, say, warn
from luthier.cli.service_flags import database_url, find_home, home_flags

if TYPE_CHECKING:
    from luthier.server.service import Service
    from luthier.server.settings import Settings

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False)


@click.command("serve", cls=Command)
@home_flags
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8440, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option(
    "--models", type=_FOLDER, metavar="DIR", help="Folder laid out org/name; names of models lead there first."
)
@click.option(
    "--model", type=_FOLDER, metavar="DIR", help="Give this one model, whose last two folders are its name (org/name)."
)
@click.option(
    "--allow", "allowed", multiple=True, metavar="MODEL", help="Base model that jobs may name, such as 'Qwen/*'."
)
@click.option("--workers", default=1, show_default=True, type=click.IntRange(0, 64), help="Worker processes to start.")
@click.option(
    "--offer", "offers", multiple=True, metavar="KIND=KIND", help="Take one kind of accelerator for another: H100=cpu."
)
@click.option("--limit", "limits", multiple=True, metavar="NAME=VALUE", help="Change a limit: file_bytes=1000000.")
@click.option("--allow-host", "allowed_hosts", multiple=True, metavar="NAME", help="Name by which clients may call it.")
@click.option("--processes", default=1, type=click.IntRange(1, 64), help="Server processes; several need PostgreSQL.")
@click.option(
    "--hosts", default=2, show_default=True, type=click.IntRange(1, 64), help="Base models to chat with at a time."
)
@click.option("--host-idle", default=600.0, show_default=True, help="Seconds until one that nobody asks is let go.")
@click.option("--tls-cert", type=_FILE, metavar="FILE", help="Certificate, to speak TLS.")
@click.option("--tls-key", type=_FILE, metavar="FILE", help="Its key.")
@click.option("--no-auth", is_flag=True, help="Refused: every server asks for keys.")
@click.option("--log-requests", is_flag=True, help="Log each request.")
def command(
    home: Path | None,
    database: str | None,
    host: str,
    port: int,
    models: Path | None,
    model: Path | None,
    allowed: tuple[str, ...],
    workers: int,
    offers: tuple[str, ...],
    limits: tuple[str, ...],
    allowed_hosts: tuple[str, ...],
    processes: int,
    hosts: int,
    host_idle: float,
    tls_cert: str | None,
    tls_key: str | None,
    no_auth: bool,
    log_requests: bool,
    as_json: bool,
) -> None:
    """Run a server that takes jobs, trains them, and lets their results be asked; Ctrl-C or SIGTERM ends it."""
    from luthier.errors import CallError

    if no_auth:
        raise CallError("a server without keys is not to be had", hint="`luthier keys create` makes a key")
    if (tls_cert is None) != (tls_key is None):
        raise CallError("--tls-cert and --tls-key go together")
    _import_packages()
    from luthier.server.logs import write_logs
    from luthier.server.running import Tls, bind, serve, set_environment
    from luthier.server.service import open_service
    from luthier.server.settings import Settings, read_limits, read_offers

    place = find_home(home)
    folder, names = _one_model(model, models, allowed) if model else (models, allowed)
    settings = Settings(
        home=place,
        database=database_url(place, database),
        host=host,
        port=port,
        models=folder.absolute() if folder else None,
        allowed_models=names,
        offers=read_offers(offers),
        allowed_hosts=allowed_hosts,
        workers=workers,
        processes=processes,
        hosts=hosts,
        host_idle_seconds=host_idle,
        limits=read_limits(limits),
        log_requests=log_requests,
    )
    if processes > 1 and settings.database.startswith("sqlite"):
        raise CallError(
            "several server processes need PostgreSQL", hint="give --database postgresql://..., or --processes 1"
        )
    write_logs()
    set_environment(settings)
    service = open_service(settings)
    first_key = _first_key(service, settings)
    tls = Tls(tls_cert, tls_key) if tls_cert and tls_key else None
    with bind(settings) as listening:
        scheme = "https" if tls else "http"
        shown_host = f"[{host}]" if ":" in host else host
        address = f"{scheme}://{shown_host}:{listening.getsockname()[1]}"
        _announce(address, place, first_key, as_json=as_json)
        if not settings.is_loopback and tls is None:
            warn("without TLS, keys and data can be read on the way: give --tls-cert and --tls-key, or use a proxy")
        serve(settings, listening, tls=tls, service=service if processes == 1 else None)


def _import_packages() -> None:
    from luthier.extras import EXTRAS, import_extra

    for package in EXTRAS["server"]:
        import_extra(package, "server")


def _one_model(model: Path, models: Path | None, allowed: tuple[str, ...]) -> tuple[Path, tuple[str, ...]]:
    """A single model is its grandparent folder of which nothing else is given."""
    from luthier.errors import CallError

    if models is not None:
        raise CallError("--model names one folder and --models a folder of many; give one of them")
    folder = model.absolute()
    return folder.parent.parent, (*allowed, f"{folder.parent.name}/{folder.name}")


def _first_key(service: Service, settings: Settings) -> str | None:
    """The key of a server's first start; an address that others can reach needs one made before."""
    from luthier.errors import CallError
    from luthier.jobs.keys import create_key, list_keys

    if list_keys(service.database):
        return None
    if not settings.is_loopback:
        raise CallError(
            f"{settings.host} can be reached by others, and this server has no key yet",
            hint=f"run: luthier keys create --scope admin --home {settings.home}",
        )
    return create_key(service.database, "default", ["admin"], name="first start")[1]


def _announce(address: str, home: Path, key: str | None, *, as_json: bool) -> None:
    if as_json:
        print_json({"address": address, "home": str(home), "key": key})
        say(end="", at_once=True)
        return
    say(f"luthier serves {address}", at_once=True)
    say(f"  home  {home}", at_once=True)
    if key:
        say(f"  key   {key}", at_once=True)
        say("        (scope admin; it is shown this once: `luthier keys create` makes others)", at_once=True)
