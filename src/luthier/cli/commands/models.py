"""`luthier models`: the results of runs on this machine, by the ids that specs and commands take."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from luthier.cli.output import Group, print_json, print_table, say, warn

if TYPE_CHECKING:
    from luthier.runs.models import ModelEntry


@click.group("models", cls=Group, invoke_without_command=True)
@click.option("--all", "with_unfinished", is_flag=True, help="List runs without a result, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def command(context: click.Context, with_unfinished: bool, as_json: bool) -> None:
    """List, show and remove the models that were trained here; MODEL anywhere takes their ids."""
    if context.invoked_subcommand is None:
        _list(with_unfinished, as_json)


@command.command("list")
@click.option("--all", "with_unfinished", is_flag=True, help="List runs without a result, too.")
def list_command(with_unfinished: bool, as_json: bool) -> None:
    """List the models, the newest first."""
    _list(with_unfinished, as_json)


def _list(with_unfinished: bool, as_json: bool) -> None:
    from luthier.runs.models import list_models

    found = [each for each in list_models() if each.final or with_unfinished]
    if as_json:
        print_json({"models": [_shown(each) for each in found]})
        return
    if not found:
        say("no models yet: `luthier train` makes one")
        return
    print_table([("id", "method", "made"), *(_row(each) for each in found)], indent="")
    say()
    say("`luthier models show ID` says where one comes from; each can be the model.base of a next run")


def _row(entry: ModelEntry) -> tuple[str, ...]:
    state = "" if entry.final else "  (no final weights)"
    gone = "" if entry.is_there else "  (its folder is gone)"
    return entry.name, entry.method, entry.created[:16].replace("T", " ") + (gone or state)


def _shown(entry: ModelEntry) -> dict[str, Any]:
    return {
        "id": entry.name,
        "run": entry.id,
        "base": entry.base,
        "method": entry.method,
        "created": entry.created,
        "run_folder": entry.run_folder,
        "final": entry.final,
        "parent": entry.parent,
        "is_there": entry.is_there,
    }


@command.command("show")
@click.argument("id")
def show(id: str, as_json: bool) -> None:
    """Show where a model lies and what it comes from."""
    from luthier.errors import RunError
    from luthier.runs.models import find_model, last_part
    from luthier.runs.run import open_run

    entry = find_model(id)
    if entry is None:
        raise RunError(f"no run `{last_part(id)}` in the index", hint="`luthier models --all` lists them")
    run = open_run(id)
    lineage = run.lineage
    if as_json:
        print_json({**_shown(entry), "state": run.state, "lineage": lineage})
        return
    base, data = lineage.get("base", {}), lineage.get("data", {})
    say(entry.name)
    rows = [
        ("state", run.state),
        ("folder", entry.run_folder),
        ("weights", entry.final or "none yet"),
        ("base", f"{entry.base}{_at(base.get('revision'))}  {_short(base.get('hash'))}"),
        ("data", f"{data.get('train') or 'unknown'}  {_short(data.get('hash'))}"),
        ("parents", ", ".join(lineage.get("parents", [])) or "none"),
    ]
    rows += [(name, f"{value:g}") for name, value in lineage.get("metrics", {}).items() if _is_number(value)]
    print_table(rows)


def _at(revision: str | None) -> str:
    return f" at {revision[:12]}" if revision else ""


def _short(digest: str | None) -> str:
    return f"(sha256 {digest[:12]})" if digest else ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@command.command("remove")
@click.argument("id")
@click.option("--delete-files", is_flag=True, help="Delete the run folder as well.")
@click.option("--yes", is_flag=True, help="Do not ask before deleting.")
def remove(id: str, delete_files: bool, yes: bool, as_json: bool) -> None:
    """Take a model out of the index; its files stay unless --delete-files says otherwise."""
    from luthier.errors import CallError, RunError
    from luthier.runs.models import find_model, last_part, list_children, remove_model
    from luthier.runs.run import Run, open_run

    entry = find_model(id)
    if entry is None:
        raise RunError(f"no run `{last_part(id)}` in the index", hint="`luthier models --all` lists them")
    run: Run | None = open_run(id) if entry.is_there else None
    if run and run.is_locked:
        raise RunError(f"{entry.id} is being trained", hint="stop it first")
    if delete_files and run and not yes:
        if not sys.stdin.isatty():
            raise CallError(f"this deletes {entry.run_folder} for good", hint="--yes says that this is meant")
        click.confirm(f"Delete {entry.run_folder} for good?", abort=True, err=True)
    remove_model(id, delete_files=delete_files)
    if as_json:
        print_json({**_shown(entry), "deleted": bool(delete_files and run)})
        return
    say(f"{entry.name} is forgotten" + (f", and {entry.run_folder} deleted" if delete_files and run else ""))
    for child in list_children(entry):
        warn(f"{child.id} starts from it and needs it to be used")
