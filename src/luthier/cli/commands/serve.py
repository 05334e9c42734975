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
    "--model",
    "given",
    type=_FOLDER,
    multiple=True,
    metavar="DIR",
    help="Give this model, under its own path and under its last two folders (org/name); may be repeated.",
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
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "fp32", "bf16"]),
    help="Number format of base models in memory.",
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
    given: tuple[Path, ...],
    allowed: tuple[str, ...],
    workers: int,
    offers: tuple[str, ...],
    limits: tuple[str, ...],
    allowed_hosts: tuple[str, ...],
    processes: int,
    hosts: int,
    precision: str,
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
    folders = _name_folders(given, models)
    folder = _write_offered(place, folders) if folders else models
    settings = Settings(
        home=place,
        database=database_url(place, database),
        host=host,
        port=port,
        models=folder.absolute() if folder else None,
        allowed_models=(*allowed, *folders),
        folders=folders,
        offers=read_offers(offers),
        allowed_hosts=allowed_hosts,
        workers=workers,
        processes=processes,
        hosts=hosts,
        precision=precision,
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


def _name_folders(given: tuple[Path, ...], models: Path | None) -> dict[str, str]:
    """The names of single models, each with its folder: the folder's own path, and its last two parts."""
    from luthier.errors import CallError

    if given and models is not None:
        raise CallError("--model names one folder and --models a folder of many; give one of them")
    folders: dict[str, str] = {}
    for model in given:
        folder = model.absolute()
        for name in (str(folder), f"{folder.parent.name}/{folder.name}"):
            if folders.setdefault(name, str(folder)) != str(folder):
                raise CallError(
                    f"--model {model}: {folders[name]} is offered as `{name}` already", hint="rename one of the folders"
                )
    return folders


def _write_offered(home: Path, folders: dict[str, str]) -> Path:
    """A models folder that holds nothing but where the single models lie."""
    import orjson

    from luthier.runs.manifest import write_durably
    from luthier.runs.model_folder import OFFERED

    place = home.absolute() / "offered"
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    named = {name: folder for name, folder in folders.items() if name != folder}
    write_durably(place / OFFERED, orjson.dumps(named))
    return place


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
