"""Weights & Biases as an event sink: offline into the run folder, online only where a key says that this is meant."""

from __future__ import annotations

import os
from typing import Any

from luthier.extras import import_extra
from luthier.reports.sinks import list_scalars
from luthier.runs.events import Event
from luthier.runs.run import Run
from luthier.spec.load import dump_spec

FOLDER = "wandb"
_EXTRA = "wandb"


class WandbSink:
    """One W&B run."""

    def __init__(self, logged: Any) -> None:
        self._logged = logged

    def log(self, event: Event) -> None:
        """Steps and evaluations become points; both may stand at one step, which W&B allows in one order only."""
        step, scalars = list_scalars(event)
        if scalars:
            self._logged.log({**scalars, "step": step})

    def close(self) -> None:
        """Write out what is still held."""
        self._logged.finish()


def open_sink(run: Run) -> WandbSink:
    """A sink of the run's own id, so that a resumed run goes on in the same W&B run."""
    wandb = import_extra("wandb", _EXTRA)
    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    (run.folder / FOLDER).mkdir(exist_ok=True)
    logged = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or "luthier",
        name=run.id,
        id=run.id[-64:],
        resume="allow" if mode == "online" else None,
        dir=str(run.folder),
        mode=mode,
        config=dump_spec(run.spec),
        settings=wandb.Settings(console="off", disable_git=True, save_code=False, silent=True),
    )
    logged.define_metric("*", step_metric="step")
    return WandbSink(logged)
