"""`luthier resume`: go on with a run from its newest whole checkpoint."""

from __future__ import annotations

import click

from luthier.cli.output import Command


@click.command("resume", cls=Command)
@click.argument("run")
@click.option("--allow-changed", is_flag=True, help="Go on although data, base, plan or number of processes changed.")
def command(run: str, allow_changed: bool, as_json: bool) -> int:
    """Go on with RUN (a folder, a run id or an ft: id) from its newest whole checkpoint."""
    from luthier.cli.live import complete_and_tell, train_and_tell
    from luthier.cli.output import tell
    from luthier.errors import ResumeError
    from luthier.runs.run import open_run
    from luthier.workflow import is_complete, warm_up

    opened = open_run(run)
    if is_complete(opened):
        raise ResumeError(
            f"{opened.id} is finished; there is nothing to resume",
            hint=f'to train on from it, set model.base = "{opened.model_id}"',
        )
    if not as_json:
        tell(f"going on with {opened.id}, which is {opened.state}")
    if opened.state == "finished":
        return complete_and_tell(opened, as_json=as_json)
    warm_up(opened.spec)
    return train_and_tell(opened, resume=True, allow_changed=allow_changed, as_json=as_json)
