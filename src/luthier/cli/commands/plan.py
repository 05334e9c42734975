"""`luthier plan`: what a run would do and take, before any model is loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from luthier.cli.flags import FLAGS, load_run_call, spec_flags
from luthier.cli.output import Command, print_json, progress_bar, say


@click.command("plan", cls=Command)
@click.argument("spec", required=False)
@spec_flags(*FLAGS)
def command(spec: str | None, settings: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Say what SPEC, or flags alone, would do: rows, tokens, steps, memory, time, and what was decided and why.

    Nothing is loaded or trained; the data is prepared, as `luthier train` would do next.
    """
    from luthier.cli.plan_report import print_plan
    from luthier.cli.report import print_data_report
    from luthier.machine import find_machine
    from luthier.workflow import plan_run, prepare_data

    loaded = load_run_call(spec, flags, settings)
    with progress_bar("reading rows", quiet=as_json) as progress:
        prepared = prepare_data(loaded.spec, progress=progress)
    plan = plan_run(loaded.spec, prepared)
    if as_json:
        print_json({**plan.as_dict(), "data": prepared.summary, "machine": asdict(find_machine())})
        return
    for note in loaded.notes:
        say(f"note: {note}")
    print_data_report(prepared.summary)
    say()
    print_plan(plan)
