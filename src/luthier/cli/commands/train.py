"""`luthier train`: from a spec, or from flags alone, to a run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from luthier.cli.flags import FLAGS, load_call, spec_flags
from luthier.cli.output import Command, print_json, progress_bar, say

if TYPE_CHECKING:
    from luthier.spec.load import LoadedSpec, Override


@click.command("train", cls=Command)
@click.argument("spec", required=False)
@click.option("--dry-run", is_flag=True, help="Prepare and check everything, then stop before training.")
@spec_flags(*FLAGS)
def command(spec: str | None, dry_run: bool, settings: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Fine-tune a model by SPEC, or by flags alone: luthier train --model M --data F --method qlora"""
    from luthier.cli.report import print_data_report
    from luthier.errors import UnsupportedError
    from luthier.spec.load import dump_spec
    from luthier.workflow import prepare_data

    loaded = load_call(spec, flags, settings)
    if loaded.spec.data.train is None:
        loaded = load_call(spec, flags, settings, extra=[_ask_for_data()])
    with progress_bar("reading rows", quiet=as_json) as progress:
        prepared = prepare_data(loaded.spec, progress=progress)
    if as_json and dry_run:
        print_json({"spec": dump_spec(loaded.spec), "data": prepared.summary, "dry_run": True})
        return
    if not as_json:
        _print_choices(loaded)
        print_data_report(prepared.summary)
    if not dry_run:
        raise UnsupportedError(
            f"engine `{loaded.spec.engine.kind}` cannot train yet in this version; the data lies at {prepared.folder}",
            hint="the data and mask proofs hold; training comes with the next version (`--dry-run` stops here)",
        )


def _ask_for_data() -> Override:
    """Ask the person, if there is one."""
    from luthier.errors import SpecError
    from luthier.spec.load import Override

    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise SpecError(
            "no training data: `data.train` is not set",
            hint="give --data FILE, or set data.train in the spec",
        )
    answer = click.prompt("Training data (a file, a folder or hf:org/name:split)", err=True)
    return Override("data.train", answer, "answer")


def _print_choices(loaded: LoadedSpec) -> None:
    """Say what did not come from the file, with its source."""
    for note in loaded.notes:
        say(f"note: {note}")
    for path, origin in loaded.origins.items():
        if origin.startswith(("flag", "--set", "answer")):
            say(f"{path} set by {origin}")
