"""`luthier train`: from a spec, or from flags alone, to a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from luthier.cli.flags import FLAGS, load_run_call, spec_flags
from luthier.cli.output import Command, heartbeat, print_json, progress_bar, say

if TYPE_CHECKING:
    from luthier.spec.load import LoadedSpec


@click.command("train", cls=Command)
@click.argument("spec", required=False)
@click.option("--dry-run", is_flag=True, help="Prepare, check and plan everything, then stop before training.")
@click.option("--server", metavar="URL", help="Have this server train; the result is fetched at the end.")
@click.option("--api-key", metavar="KEY", help="Its key; LUTHIER_API_KEY keeps it off the command line.")
@click.option("--env-file", type=click.Path(dir_okay=False, path_type=Path), help="A .env file that names the key.")
@click.option("--dialect", type=click.Choice(["luthier", "synth"]), default="luthier", help="What the server speaks.")
@click.option("--suffix", help="Becomes part of the id of the result on the server.")
@click.option("--no-wait", is_flag=True, help="Submit the job and leave.")
@click.option("--poll-seconds", type=click.FloatRange(min=0.1), default=5.0, help="How long to wait between questions.")
@spec_flags(*FLAGS)
def command(
    spec: str | None,
    dry_run: bool,
    server: str | None,
    api_key: str | None,
    env_file: Path | None,
    dialect: str,
    suffix: str | None,
    no_wait: bool,
    poll_seconds: float,
    settings: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> int:
    """Fine-tune a model by SPEC, or by flags alone: luthier train --model M --data F --method qlora"""
    from luthier.cli.live import train_and_tell
    from luthier.cli.plan_report import print_plan
    from luthier.cli.report import print_data_report
    from luthier.workflow import make_ready, plan_run, prepare_data, start_run, warm_up

    loaded = load_run_call(spec, flags, settings)
    if server:
        from luthier.cli.remote import Remote, train_there

        remote = Remote(server, api_key, env_file, dialect, wait=not no_wait, poll_seconds=poll_seconds)
        return train_there(loaded, remote, suffix=suffix, dry_run=dry_run, as_json=as_json)
    if not dry_run:
        warm_up(loaded.spec)
    doing = f"reading {loaded.spec.data.train} for {loaded.spec.model.base}"
    with heartbeat(doing, quiet=as_json), progress_bar("reading rows", quiet=as_json) as progress:
        prepared = prepare_data(loaded.spec, progress=progress)
    with heartbeat("planning and looking at the base model", quiet=as_json):
        if dry_run:
            plan = plan_run(loaded.spec, prepared)
        else:
            ready = make_ready(loaded.spec, prepared)
            plan = ready.plan
    if as_json and dry_run:
        print_json({"plan": plan.as_dict(), "data": prepared.summary, "dry_run": True})
        return 0
    if not as_json:
        _print_choices(loaded)
        print_data_report(prepared.summary)
        print_plan(plan)
        say(end="", at_once=True)
    if dry_run:
        return 0
    with heartbeat("taking the hashes of the base model", quiet=as_json):
        run = start_run(ready)
    if not as_json:
        say(f"run {run.folder}", at_once=True)
    return train_and_tell(run, ready, as_json=as_json)


def _print_choices(loaded: LoadedSpec) -> None:
    """Say what did not come from the file, with its source."""
    for note in loaded.notes:
        say(f"note: {note}")
    for path, origin in loaded.origins.items():
        if origin.startswith(("flag", "--set", "answer")):
            say(f"{path} set by {origin}")
