"""Weights & Biases as an event sink: offline into the run folder, online only where the environment says so.

Online is WANDB_MODE=online, or a WANDB_API_KEY without any WANDB_MODE; everything else reaches no network.
"""

from __future__ import annotations

import os
from typing import Any

from luthier.extras import import_extra
from luthier.reports.sinks import list_scalars
from luthier.runs.events import Event, Finished
from luthier.runs.run import Run
from luthier.spec.load import dump_spec

FOLDER = "wandb"
_EXTRA = "wandb"
_PROJECT = "luthier"
_MOST_LETTERS = 64  # of an id of theirs


class WandbSink:
    """One W&B run."""

    def __init__(self, logged: Any) -> None:
        self._logged = logged
        self._is_finished = False

    def log(self, event: Event) -> None:
        """Steps and evaluations become points; both may stand at one step, which W&B allows in one order only."""
        self._is_finished = self._is_finished or isinstance(event, Finished)
        step, scalars = list_scalars(event)
        if scalars:
            self._logged.log({**scalars, "step": step})

    def close(self) -> None:
        """Write out what is still held; a run that did not end well is shown so."""
        self._logged.finish(exit_code=0 if self._is_finished else 1)


def open_sink(run: Run) -> WandbSink:
    """A sink of the run's own id, so that a resumed run goes on in the same W&B run."""
    mode = _find_mode()
    if mode != "online":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would go to their servers even so
    wandb = import_extra("wandb", _EXTRA)
    (run.folder / FOLDER).mkdir(exist_ok=True)
    logged = wandb.init(
        project=run.spec.output.wandb_project or os.environ.get("WANDB_PROJECT") or _PROJECT,
        name=run.id,
        id=run.id[-_MOST_LETTERS:],
        resume="allow" if mode == "online" else None,
        dir=str(run.folder),
        mode=mode,
        config=dump_spec(run.spec),
        settings=wandb.Settings(console="off", disable_git=True, save_code=False, silent=True),
    )
    logged.define_metric("*", step_metric="step")
    return WandbSink(logged)


def find_command(run: Run) -> str:
    """What puts a run that was written offline on their servers; empty where there is none."""
    kept = run.folder / FOLDER
    return f"wandb sync {kept}/offline-run-*" if next(kept.glob("offline-run-*"), None) else ""


def _find_mode() -> str:
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
