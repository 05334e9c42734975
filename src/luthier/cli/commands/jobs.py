"""`luthier jobs`: the jobs of a server, from anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from luthier.cli.output import Group, print_json, print_table, say, tell
from luthier.cli.remote import Remote, end_there, follow_there

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def server_flags(function: Decorated) -> Decorated:
    """`--server`, `--api-key` and `--env-file`."""
    for option in (
        click.option("--env-file", type=click.Path(dir_okay=False, path_type=Path), help="A .env file to read."),
        click.option("--api-key", metavar="KEY", help="The key; LUTHIER_API_KEY keeps it off the command line."),
        click.option("--server", metavar="URL", help="The server, such as http://127.0.0.1:8440; or LUTHIER_SERVER."),
    ):
        function = option(function)
    return function


@click.group("jobs", cls=Group)
def command() -> None:
    """List, show, follow, stop and fetch the jobs of a server."""


@command.command("list")
@server_flags
@click.option("--state", "states", multiple=True, help="Only jobs in this state, such as running.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
def list_command(
    server: str | None,
    api_key: str | None,
    env_file: Path | None,
    states: tuple[str, ...],
    limit: int,
    as_json: bool,
) -> None:
    """List the jobs of the key's project, the newest first."""
    connection = Remote(server, api_key, env_file).connect()
    page = connection.get("/luthier/v1/jobs", limit=limit, state=list(states) or None)
    if as_json:
        print_json(page)
        return
    if not page["jobs"]:
        say("no jobs yet: `luthier train SPEC --server URL` makes one")
        return
    rows = [(job["id"], job["state"], _progress(job), job["base"], _when(job["created_at"])) for job in page["jobs"]]
    print_table([("id", "state", "step", "base", "made"), *rows], indent="")
    if page["has_more"]:
        say("there are more: --limit N")


@command.command("show")
@click.argument("job")
@server_flags
def show(job: str, server: str | None, api_key: str | None, env_file: Path | None, as_json: bool) -> None:
    """Show a job as it stands."""
    from luthier.client.follow import show as read

    found = read(Remote(server, api_key, env_file).connect(), job)
    if as_json:
        print_json(found)
        return
    error = found["error"] or {}
    facts = [
        ("state", found["state"]),
        ("base", found["base"]),
        ("model", found["model"] or "none yet"),
        ("step", _progress(found)),
        ("attempt", f"{found['attempt']}, after {found['crashes']} crashes" if found["crashes"] else found["attempt"]),
        ("made", _when(found["created_at"])),
        ("ended", _when(found["finished_at"]) if found["finished_at"] else ""),
        ("error", f"{error.get('message')} ({error.get('code')})" if error else ""),
    ]
    say(found["id"])
    print_table([(name, str(value)) for name, value in facts if value])


@command.command("follow")
@click.argument("job")
@server_flags
@click.option("--poll-seconds", type=click.FloatRange(min=0.1), default=5.0, help="Wait so long before trying again.")
def follow(
    job: str, server: str | None, api_key: str | None, env_file: Path | None, poll_seconds: float, as_json: bool
) -> int:
    """Follow a job from its first event until it rests, then fetch its result."""
    connection = Remote(server, api_key, env_file).connect()
    code = follow_there(connection, job, poll_seconds=poll_seconds, quiet=as_json)
    return code or end_there(connection, job, None, as_json=as_json)


@command.command("download")
@click.argument("job")
@server_flags
@click.option("-o", "--output-dir", type=click.Path(file_okay=False, path_type=Path), default=Path("runs"))
@click.option("--everything", is_flag=True, help="With checkpoints and what resuming needs.")
def download(
    job: str,
    server: str | None,
    api_key: str | None,
    env_file: Path | None,
    output_dir: Path,
    everything: bool,
    as_json: bool,
) -> None:
    """Fetch the files of a job; what is here already and whole is not fetched again."""
    from luthier.client.results import download as fetch

    connection = Remote(server, api_key, env_file).connect()
    folder = fetch(connection, job, output_dir, everything=everything, told=_nothing if as_json else tell)
    if as_json:
        print_json({"job": job, "folder": str(folder)})
    else:
        say(str(folder))


def _nothing(_: str) -> None:
    return


def _act(name: str, sentence: str) -> None:
    """A command that asks one thing of a job."""

    @command.command(name, help=sentence)
    @click.argument("job")
    @server_flags
    def act(job: str, server: str | None, api_key: str | None, env_file: Path | None, as_json: bool) -> None:
        from luthier.client.connection import quoted

        connection = Remote(server, api_key, env_file).connect()
        found = connection.call("POST", f"/luthier/v1/jobs/{quoted(job)}/{name}", is_safe=True)
        if as_json:
            print_json(found)
        else:
            say(f"{found['id']} is {found['state']}")


_act("cancel", "Stop a job for good; what it has saved stays until it is deleted.")
_act("pause", "Have a job save its state and stop, until it is resumed.")
_act("resume", "Put a paused job back into the queue.")


def _progress(job: dict[str, Any]) -> str:
    return f"{job['step'] or 0}/{job['steps']}" if job["steps"] else "-"


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
