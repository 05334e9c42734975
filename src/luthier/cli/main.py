"""The `luthier` command: finds the command by name, and turns every error into two lines a person can use."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

import click

import luthier
from luthier.cli.output import print_error, wants_json
from luthier.errors import CallError, LuthierError

# Module and one line of help, so that `luthier --help` imports none of them.
COMMANDS = {
    "train": ("luthier.cli.commands.train", "Fine-tune a model by a spec, or by flags alone."),
    "plan": ("luthier.cli.commands.plan", "Say what a run would do and take, before it starts."),
    "resume": ("luthier.cli.commands.resume", "Go on with a run that was stopped or died."),
    "prove": ("luthier.cli.commands.prove", "Prove on your own spec what Luthier promises."),
    "evaluate": ("luthier.cli.commands.evaluate", "Count the held-out rows that a model answers exactly right."),
    "compare": ("luthier.cli.commands.compare", "Set a model beside what it started from, on the same prompts."),
    "chat": ("luthier.cli.commands.chat", "Talk with a model, or with it and what it started from."),
    "verify": ("luthier.cli.commands.verify", "Hold a run's result against what the live model said."),
    "merge": ("luthier.cli.commands.merge", "Merge a run's adapter into its base, with a certificate."),
    "report": ("luthier.cli.commands.report", "Say what a run came to, or several side by side, and what to do next."),
    "rows": ("luthier.cli.commands.rows", "Show which rows a step trained, or which steps trained a row."),
    "models": ("luthier.cli.commands.models", "List, show and remove the models that were trained here."),
    "export": ("luthier.cli.commands.export", "Write a run's result for PEFT, transformers, MLX, GGUF or Ollama."),
    "push": ("luthier.cli.commands.push", "Put a run's result on the Hugging Face hub."),
    "serve": ("luthier.cli.commands.serve", "Run a server that takes jobs from clients and trains them."),
    "worker": ("luthier.cli.commands.worker", "Run a worker alone, for a server on another machine."),
    "jobs": ("luthier.cli.commands.jobs", "List, follow, stop and fetch the jobs of a server."),
    "keys": ("luthier.cli.commands.keys", "Create, list and revoke the keys of a server."),
    "tinker": ("luthier.cli.commands.tinker", "Look at a Tinker service: its models, limits and methods."),
    "data": ("luthier.cli.commands.data", "Check, show, split, prepare and convert training data."),
    "spec": ("luthier.cli.commands.spec", "Check and show run specs."),
    "recipes": ("luthier.cli.commands.recipes", "List, show and copy the specs shipped with Luthier."),
    "doctor": ("luthier.cli.commands.doctor", "Say what is installed here, and what to do next."),
    "completion": ("luthier.cli.commands.completion", "Print the shell completion for bash, zsh or fish."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, 1)
            hint = f"did you mean `luthier {close[0]}`?" if close else "`luthier --help` lists the commands"
            raise CallError(f"no command `{args[0]}`", hint=hint) from error


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(luthier.__version__, message="luthier %(version)s")
@click.option("--traceback", is_flag=True, help="Show where an error was raised, for a bug report.")
def app(traceback: bool) -> None:
    """Fine-tune open-weight language models, and prove what was done."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # looking for plugins costs 16 ms of every start
    gc.set_threshold(50_000)  # collecting while modules are imported costs 10 ms more
    try:
        code = app.main(given, prog_name="luthier", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except Exception as error:  # the edge of the process: a person never sees a traceback they did not ask for
        if "--traceback" in given:
            raise
        return _report(error, given)
    except KeyboardInterrupt:
        print_error(LuthierError("stopped", hint="nothing was changed"), as_json=wants_json(given))
        return 130


def _report(error: Exception, given: list[str]) -> int:
    if isinstance(error, BrokenPipeError):
        # The reader of our output went away (`| head`): not an error, and nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, click.Abort):
        error = LuthierError("stopped", hint="nothing was changed")
        error.exit_code = 130
    shown = error if isinstance(error, LuthierError) else _translated(error)
    print_error(shown, as_json=wants_json(given))
    return shown.exit_code


def _translated(error: Exception) -> LuthierError:
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "luthier"
        return CallError(_plain(error.format_message()), hint=f"`{command} --help` shows how it is called")
    if isinstance(error, click.ClickException):
        return CallError(_plain(error.format_message()))
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return LuthierError(f"{name}{error.strerror or error}")
    return LuthierError(
        f"an error of Luthier's own: {type(error).__name__}: {error}",
        hint="please report it, with what `luthier --traceback ...` and `luthier doctor` print",
    )


def _plain(message: str) -> str:
    """Click's sentences in our shape: lower case start, no full stop."""
    text = " ".join(message.split()).rstrip(".")
    return text[:1].lower() + text[1:]


def entry(*_: Any) -> None:
    """What the installed script calls."""
    signal.signal(signal.SIGTERM, _leave)
    try:
        code = main()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    end(code)


def end(code: int) -> NoReturn:
    """End the process; taking torch apart on the way out would cost most of a second and save nothing.

    Threads of the Tinker SDK's transport may even abort an interpreter that ends under them.
    """
    if not {"torch", "tinker"} & sys.modules.keys():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _leave(number: int, _: FrameType | None) -> None:
    """Asked to end while nothing listens that has more to save: end as by an error, so that drafts are cleaned up."""
    sys.exit(128 + number)
