"""`luthier recipes`: specs shipped with Luthier, handed out as files a person owns."""

from __future__ import annotations

from pathlib import Path

import click

from luthier.cli.output import Group, print_json, print_table, say


@click.group("recipes", cls=Group)
def command() -> None:
    """List, show and copy the specs shipped with Luthier."""


@command.command("list")
def list_command(as_json: bool) -> None:
    """List the recipes with what each promises."""
    from luthier.runs.recipes import list_recipes, load_recipe

    found = [(name, load_recipe(name)[0].about) for name in list_recipes()]
    if as_json:
        print_json({"recipes": [{"name": name, **about.model_dump()} for name, about in found]})
        return
    print_table([(name, about.title, about.promise) for name, about in found], indent="")
    say()
    say("`luthier recipes copy NAME .` gives you one as a file of your own")


@command.command("show")
@click.argument("name")
def show(name: str, as_json: bool) -> None:
    """Print a recipe."""
    from luthier.runs.recipes import load_recipe

    spec, text = load_recipe(name)
    if as_json:
        print_json({"name": name, "text": text, "about": spec.about.model_dump()})
    else:
        say(text.rstrip())


@command.command("copy")
@click.argument("name")
@click.argument("target", default=".")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def copy(name: str, target: str, force: bool, as_json: bool) -> None:
    """Copy a recipe to TARGET (a folder or a file)."""
    from luthier.data.files import write_text
    from luthier.errors import CallError
    from luthier.runs.recipes import own_recipe

    text = own_recipe(name)
    path = Path(target) / f"{name}.toml" if Path(target).is_dir() or target.endswith("/") else Path(target)
    if path.exists() and not force:
        raise CallError(f"{path} exists already", hint="--force replaces it")
    write_text(path, text)
    if as_json:
        print_json({"name": name, "path": str(path)})
    else:
        say(f"{path} is yours: edit it, then `luthier spec check {path}`")
