"""`luthier spec`: check a run spec, show it resolved, print its schema."""

from __future__ import annotations

from typing import Any

import click

from luthier.cli.flags import load_call, spec_flags
from luthier.cli.output import Group, paint, print_json, say

_FLAGS = ("model", "data", "method", "learning-rate", "epochs", "batch")


@click.group("spec", cls=Group)
def command() -> None:
    """Check and show run specs."""


@command.command("check")
@click.argument("spec")
@spec_flags(*_FLAGS)
def check(spec: str, settings: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Check SPEC; every problem is listed with its place and the nearest known name."""
    loaded = load_call(spec, flags, settings)
    if as_json:
        print_json({"ok": True, "spec": loaded.name, "notes": list(loaded.notes)})
        return
    say(f"{loaded.name}: ok")
    for note in loaded.notes:
        say(f"  note: {note}")


@command.command("show")
@click.argument("spec")
@spec_flags(*_FLAGS)
def show(spec: str, settings: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Print SPEC with every value resolved, and where each came from."""
    from luthier.spec.load import dump_spec, render_toml

    loaded = load_call(spec, flags, settings)
    if as_json:
        print_json({"spec": dump_spec(loaded.spec), "origins": loaded.origins, "notes": list(loaded.notes)})
        return
    for note in loaded.notes:
        say(f"# note: {note}")
    table = ""
    for line in render_toml(dump_spec(loaded.spec)).rstrip().split("\n"):
        if line.startswith("["):
            table = line.strip("[]") + "."
        key = line.partition(" = ")[0]
        origin = loaded.origins.get(f"{table}{key}")
        comment = "" if origin in (None, "default") else "  " + paint(f"# {origin}", "36")
        say(f"{line}{comment}")


@command.command("schema")
def schema(as_json: bool) -> None:
    """Print the JSON schema of a run spec."""
    from luthier.spec.describe import build_schema

    print_json(build_schema())
