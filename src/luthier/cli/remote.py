"""What a person sees of a job on a server: the same live line as of a run here, and where its result went."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from luthier.cli.output import heartbeat, paint, print_json, say, tell, warn
from luthier.errors import LuthierError

if TYPE_CHECKING:
    from luthier.client.connection import Connection
    from luthier.spec.load import LoadedSpec
    from luthier.spec.run import RunSpec

_DETACHED = 130


@dataclass(frozen=True)
class Remote:
    """How a call reaches a server, and how it waits for it."""

    server: str | None = None
    key: str | None = None
    env_file: Path | None = None
    dialect: str = "luthier"
    wait: bool = True
    poll_seconds: float = 5.0

    def connect(self) -> Connection:
        """The server that the call means."""
        from luthier.client.address import Address, find_address
        from luthier.client.connection import Connection

        choose = _choose if sys.stdin.isatty() and sys.stderr.isatty() else None
        address = find_address(self.server, self.key, env_file=self.env_file, choose=choose)
        if address.travels_openly:
            warn(f"the key travels unencrypted to {address.url}; https would hide it")
        if self.dialect == "luthier":
            address = Address(address.root, address.key)
        elif not address.url.endswith("/api"):
            address = Address(f"{address.url}/api", address.key)
        return Connection(address)


def _choose(found: Sequence[Path]) -> Path:
    for number, path in enumerate(found, 1):
        tell(f"  {number}  {path}")
    number = click.prompt("Which file names the server", type=click.IntRange(1, len(found)), default=1, err=True)
    return found[number - 1]


def train_there(loaded: LoadedSpec, remote: Remote, *, suffix: str | None, dry_run: bool, as_json: bool) -> int:
    """Check the rows here, then have the server train; returns the exit code."""
    from luthier.client.submit import ROOT, build_submission, send
    from luthier.client.synth import build_payload

    spec = loaded.spec
    submission = build_submission(spec, suffix=suffix)
    _check_rows(spec, as_json=as_json)
    if dry_run:
        is_synth = remote.dialect == "synth"
        payload = build_payload(spec, submission, {}) if is_synth else submission.payload({})
        where = "/api/learning/jobs" if is_synth else f"{ROOT}/jobs"
        print_json({"dry_run": True, "post": where, "payload": payload})
        return 0
    connection = remote.connect()
    told = _quiet if as_json else tell
    if remote.dialect == "synth":
        return _train_by_synth(connection, spec, submission, remote, as_json=as_json)
    job = send(connection, submission, told)
    if not remote.wait:
        _say_made(connection, job, as_json=as_json)
        return 0
    tell(f"job {job['id']} on {connection.address.url}")
    code = follow_there(connection, job["id"], poll_seconds=remote.poll_seconds, quiet=as_json)
    return code if code == _DETACHED else end_there(connection, job["id"], spec.output, as_json=as_json)


def _check_rows(spec: RunSpec, *, as_json: bool) -> None:
    """The data issue's checks before anything is sent: with the model's own template where the model is here."""
    from luthier.cli.report import print_data_report
    from luthier.machine import expand
    from luthier.runs.layout import PRACTICE
    from luthier.workflow import prepare_data

    is_here = spec.model.base == PRACTICE or expand(spec.model.base).is_dir()
    with heartbeat(f"checking {spec.data.train}", quiet=as_json):
        prepared = prepare_data(spec, with_model=is_here)
    if not as_json:
        print_data_report(prepared.summary)


def follow_there(connection: Connection, job: str, *, poll_seconds: float, quiet: bool, after: int = 0) -> int:
    """Show a job until it rests; 130 where a person stopped looking."""
    from luthier.cli.live import Live
    from luthier.client.follow import follow

    def lost(said: str) -> None:
        if not quiet:
            tell(f"no connection ({said}); the job goes on, trying again")

    try:
        with Live(0, quiet=quiet) as live:
            for event in follow(connection, job, after=after, lost=lost, poll_seconds=poll_seconds):
                if event.kind == "planned":
                    live.steps = int(event.data.get("steps") or 0)
                if typed := event.typed():
                    live(typed)
                elif not quiet:
                    tell(event.message)
    except KeyboardInterrupt:
        tell(f"\nno longer following; the job goes on. Follow it again:\n  luthier jobs follow {job}")
        return _DETACHED
    return 0


def end_there(connection: Connection, job: str, output: Any, *, as_json: bool) -> int:
    """How the job ended; its result is brought here. Returns the exit code."""
    from luthier.client.follow import show
    from luthier.client.results import download

    found = show(connection, job)
    folder = None
    if found["state"] == "succeeded":
        parent = Path(getattr(output, "dir", None) or "runs")
        folder = download(connection, job, parent, told=_quiet if as_json else tell)
        if name := getattr(output, "model_id_file", None):
            Path(name).write_text(f"{found['model']}\n", "utf-8")
    if as_json:
        print_json({"job": found, "folder": str(folder) if folder else None})
    else:
        _say_end(found, folder)
    return 0 if found["state"] in ("succeeded", "paused") else 1


def _say_end(job: dict[str, Any], folder: Path | None) -> None:
    state = job["state"]
    if state == "succeeded":
        say(f"{paint('done', '32')} on the server")
        say(f"  model    {job['model']}")
        say(f"  result   {folder}")
        if folder and (folder / "finetune_report.html").is_file():
            say(f"  report   {folder / 'finetune_report.html'}")
        say(f"next:  luthier evaluate {folder} --data FILE")
    elif state == "paused":
        say(f"paused; go on:  luthier jobs resume {job['id']}")
    else:
        error = job.get("error") or {}
        raise LuthierError(
            f"the job {job['id']} {state}: {error.get('message') or 'as somebody asked'}",
            hint=f"luthier jobs show {job['id']}",
        )


def _say_made(connection: Connection, job: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json({"job": job})
        return
    say(f"job {job['id']} on {connection.address.url}")
    say(f"follow it:  luthier jobs follow {job['id']}")


def _train_by_synth(connection: Connection, spec: RunSpec, submission: Any, remote: Remote, *, as_json: bool) -> int:
    from luthier.client import synth

    told = _quiet if as_json else tell
    job = synth.send(connection, spec, submission, told)
    if not remote.wait:
        if as_json:
            print_json({"job": {"id": job}})
        else:
            say(f"job {job} on {connection.address.url}")
        return 0
    try:
        found = synth.follow(connection, job, told=told, poll_seconds=remote.poll_seconds)
    except KeyboardInterrupt:
        tell(f"\nno longer following; the job {job} goes on")
        return _DETACHED
    status, model = str(found.get("status") or found.get("state")), synth.find_model(found)
    if spec.output.model_id_file and model:
        Path(spec.output.model_id_file).write_text(f"{model}\n", "utf-8")
    if as_json:
        print_json({"job": found})
    else:
        say(f"{status}: {model or found.get('error') or 'no model'}")
    return 0 if status.lower() in synth.SUCCEEDED else 1


def _quiet(_: str) -> None:
    return
