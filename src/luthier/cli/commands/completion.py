"""`luthier completion`: the script that lets a shell complete commands and flags."""

from __future__ import annotations

import click

from luthier.cli.output import Command, print_json, say


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str, as_json: bool) -> None:
    """Print the completion script, for instance: luthier completion bash >> ~/.bashrc"""
    from click.shell_completion import get_completion_class

    from luthier.cli.main import app

    found = get_completion_class(shell)
    assert found is not None
    script = found(app, {}, "luthier", "_LUTHIER_COMPLETE").source()
    if as_json:
        print_json({"shell": shell, "script": script})
    else:
        say(script)
