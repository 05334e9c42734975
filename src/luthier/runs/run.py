"""A run: its folder made, opened, locked, and read; everything else in it is written by those who train and report."""

from __future__ import annotations

import difflib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import orjson

from luthier.errors import RunError, RunLockedError
from luthier.machine import expand
from luthier.runs import layout
from luthier.runs.checkpoints import CheckpointStore
from luthier.runs.events import EventLog, read_events
from luthier.runs.lineage import build_lineage, list_parents, read_lineage, write_lineage
from luthier.runs.manifest import MANIFEST, storage_errors, write_durably
from luthier.runs.models import find_model, list_models, register

if TYPE_CHECKING:
    from luthier.data.prepared import Prepared
    from luthier.runs.resolve import ResolvedModel
    from luthier.spec.plan import RunPlan
    from luthier.spec.run import RunSpec

State = Literal["running", "stopped", "paused", "failed", "finished"]

_STATES: dict[str, State] = {
    "run_started": "running",
    "resumed": "running",
    "stopped": "stopped",
    "paused": "paused",
    "failed": "failed",
    "finished": "finished",
}
_LOCK_TRIES = 20
_LOCK_WAIT_SECONDS = 0.02
_NOT_LOGGED = ("seq", "time", "kind")


class Run:
    """An opened run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def id(self) -> str:
        """The run's id, which is the name of its folder."""
        return self.folder.resolve().name

    @cached_property
    def spec(self) -> RunSpec:
        """The resolved spec in `finetune_config.yaml`."""
        from luthier.spec.load import load_spec

        return load_spec(self.folder / layout.CONFIG).spec

    @property
    def model_id(self) -> str:
        """The `ft:` id of the run's result."""
        return layout.model_id(self.spec.model.base, self.id)

    @cached_property
    def events(self) -> EventLog:
        """The log that events are appended to."""
        return EventLog(self.folder / layout.EVENTS)

    def read_events(self) -> list[dict[str, Any]]:
        """All events so far."""
        return read_events(self.folder / layout.EVENTS)

    def checkpoints(self, *, keep_weights: int | None = None, keep_states: int = 2) -> CheckpointStore:
        """The store of the run's checkpoints."""
        return CheckpointStore(self.folder, keep_weights=keep_weights, keep_states=keep_states)

    @property
    def lineage(self) -> dict[str, Any]:
        """What `lineage.json` says."""
        return read_lineage(self.folder)

    def held_out_rows(self) -> set[tuple[str, int]]:
        """File and line of each row that the ledger holds out."""
        with (self.folder / layout.LEDGER).open("rb") as lines:
            entries = (orjson.loads(line) for line in lines)
            return {(entry["file"], entry["line"]) for entry in entries if entry["place"] == "valid"}

    @property
    def final_weights(self) -> Path | None:
        """The folder of the final adapter or model, once it is sealed."""
        for name in (layout.FINAL_LORA_WEIGHTS, layout.FINAL_MODEL):
            if (self.folder / name / MANIFEST).is_file():
                return self.folder / name
        return None

    @property
    def state(self) -> State:
        """How the run stands by its events; one whose process died counts as stopped."""
        seen = [_STATES[event["kind"]] for event in self.read_events() if event["kind"] in _STATES]
        last = seen[-1] if seen else "running"
        return "stopped" if last == "running" and not self.is_locked else last

    @property
    def is_locked(self) -> bool:
        """Whether a process is training the run at this moment."""
        import fcntl

        try:
            with (self.folder / layout.LOCK).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only process that trains this run; the lock is gone with the process, however it ends."""
        with storage_errors(self.folder):
            file = (self.folder / layout.LOCK).open("a+b")
        with file:
            self._take(file)
            file.truncate(0)
            file.write(str(os.getpid()).encode())
            file.flush()
            yield

    def _take(self, file: IO[bytes]) -> None:
        import fcntl

        for left in reversed(range(_LOCK_TRIES)):
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if left:
                time.sleep(_LOCK_WAIT_SECONDS)  # who only asks for the state holds it for a moment
        file.seek(0)
        owner = file.read(20).decode(errors="replace") or "unknown"
        raise RunLockedError(
            f"{self.id} is being trained by another process (pid {owner})",
            hint="wait for it to end, or stop it first",
            where=str(self.folder),
        )


def create_run(
    parent: Path,
    plan: RunPlan,
    prepared: Prepared,
    resolved: ResolvedModel,
    *,
    now: datetime | None = None,
    id: str | None = None,
) -> Run:
    """Make a run folder with the plan, the ledger and the lineage in it, and put it in the index.

    With an `id` the folder has that name, and what a process that died left of its making is made anew.
    """
    from luthier.spec.plan import render_plan_yaml

    created = now or datetime.now().astimezone()
    with storage_errors(parent):
        folder = _make_named(parent / id) if id else _make_folder(parent, plan, created)
        write_durably(folder / layout.CONFIG, render_plan_yaml(plan).encode())
        for name in (layout.LEDGER, layout.REJECTED):
            shutil.copyfile(prepared.folder / name, folder / name)
        parent_entry = find_model(resolved.parent) if resolved.parent else None
        parents = list_parents(Path(parent_entry.run_folder)) if parent_entry else list(filter(None, [resolved.parent]))
        run = Run(folder)
        write_lineage(run, build_lineage(run.id, plan, prepared, resolved, created=created, parents=parents))
    register(run)
    return run


def _make_folder(parent: Path, plan: RunPlan, now: datetime) -> Path:
    while True:
        folder = parent / layout.run_id(plan.spec.method.kind, plan.spec.model.base, now)
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def _make_named(folder: Path) -> Path:
    if is_made(folder):
        raise RunError(f"{folder.name} is there already", hint=f"go on: luthier resume {folder}", where=str(folder))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def is_made(folder: Path) -> bool:
    """Whether all that a run folder starts with is in it; the lineage is written last."""
    return (folder / layout.LINEAGE).is_file()


def open_run(name: str | Path) -> Run:
    """The run of a folder, of a run id or of an `ft:` id."""
    path = expand(name)
    for folder in (path, Path("runs") / path):
        if (folder / layout.CONFIG).is_file():
            return Run(folder)
    entry = find_model(str(name))
    if entry and entry.is_there:
        return Run(Path(entry.run_folder))
    if entry:
        raise RunError(
            f"the folder of {entry.id} is gone: {entry.run_folder}",
            hint=f"`luthier models remove {entry.id}` forgets it",
            where=entry.run_folder,
        )
    if path.is_dir():
        raise RunError(
            f"{path}: not a run folder: it holds no {layout.CONFIG}", hint="`luthier models --all` lists runs"
        )
    close = difflib.get_close_matches(str(name), [each.id for each in list_models()], 1)
    raise RunError(
        f"no run `{name}`", hint=f"did you mean `{close[0]}`?" if close else "`luthier models --all` lists runs"
    )


def write_training_log(run: Run) -> list[dict[str, Any]]:
    """Write `training_log.json`: one entry a step, its evaluation beside it; what a resume threw away is left out."""
    steps: dict[int, dict[str, Any]] = {}
    for event in run.read_events():
        kind, step = event["kind"], event.get("step")
        if kind == "resumed":
            steps = {number: entry for number, entry in steps.items() if number <= event["step"]}
        elif kind == "step_done":
            measured = steps.get(event["step"], {}).get("eval")
            steps[event["step"]] = _logged(event) | ({"eval": measured} if measured else {})
        elif kind == "step_skipped":
            steps[event["step"]] = {"step": step, "skipped": event["reason"]}
        elif kind == "evaluated":
            said = {key: value for key, value in _logged(event).items() if key != "step"}
            steps.setdefault(event["step"], {"step": step})["eval"] = said
    log = [steps[number] for number in sorted(steps)]
    write_durably(run.folder / layout.TRAINING_LOG, orjson.dumps(log, option=orjson.OPT_INDENT_2))
    return log


def _logged(event: dict[str, Any]) -> dict[str, Any]:
    said = {key: value for key, value in event.items() if key not in _NOT_LOGGED}
    return {**{key: value for key, value in said.items() if key != "metrics"}, **said.get("metrics", {})}
