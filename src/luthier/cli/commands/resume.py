"""`luthier resume`: go on with a run from its newest whole checkpoint."""

from __future__ import annotations

import click

from luthier.cli.output import Command


@click.command("resume", cls=Command)
@click.argument("run")
@click.option("--allow-changed", is_flag=True, help="Go on although data, base, plan or number of processes changed.")
def command(run: str, allow_changed: bool, as_json: bool) -> int:
    """Go on with RUN (a folder, a run id or an ft: id) from its newest whole checkpoint."""
    from luthier.cli.live import train_and_tell
    from luthier.errors import ResumeError
    from luthier.runs.run import open_run
    from luthier.workflow import warm_up

    opened = open_run(run)
    if opened.state == "finished":
        raise ResumeError(
            f"{opened.id} is finished; there is nothing to resume",
            hint=f'to train on from it, set model.base = "{opened.model_id}"',
        )
    warm_up(opened.spec)
    return train_and_tell(opened, resume=True, allow_changed=allow_changed, as_json=as_json)
