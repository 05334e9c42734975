"""One process's work on one run: engine, references, resume, loop and results, with every event recorded."""

from __future__ import annotations

import importlib
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.order import step_examples
from luthier.data.prepared import Prepared
from luthier.engines.registry import JOBS, REMOTE, find_engine
from luthier.engines.verbs import Trainee
from luthier.errors import DiskFullError, LuthierError, ResumeError, StorageError
from luthier.runs import events
from luthier.runs.checkpoints import CheckpointStore, ResumePoint
from luthier.runs.lineage import accept_changes, data_hash, list_changes, list_version_changes, list_versions
from luthier.runs.resolve import ResolvedModel
from luthier.runs.run import Run
from luthier.spec.method import FullMethod
from luthier.spec.objective import DpoObjective
from luthier.spec.plan import RunPlan
from luthier.training.course import Hear, Outcome, Progress
from luthier.training.finish import close_run, keep_best, write_results
from luthier.training.loop import Loop
from luthier.training.objectives import References
from luthier.training.passes import Pass, Watch
from luthier.training.reference import compute_references, find_references, write_references
from luthier.training.signals import AskedToStop, StopFlag

_KEPT_FULL_CHECKPOINTS = 2


@dataclass(frozen=True)
class Work:
    """All that a process needs to train a run; `share` is its number among how many."""

    run: Run
    plan: RunPlan
    prepared: Prepared
    resolved: ResolvedModel
    home: Path
    watch: Watch
    stop: StopFlag
    share: tuple[int, int] = (0, 1)
    packed: bool = True
    """Whether rows share a forward pass; a proof turns it off."""
    hear: Hear | None = None
    """Told of every sequence that is handed to the engine; a proof listens."""

    @property
    def leads(self) -> bool:
        """Whether this process writes."""
        return self.share[0] == 0


@dataclass(frozen=True)
class Trained:
    """How a run ended, and where its result is."""

    outcome: Outcome
    progress: Progress
    final: Path | None
    merged: Path | None = None


def train(work: Work, *, resume: bool = False, allow_changed: bool = False) -> Trained:
    """Train the run from its start or from its newest checkpoint."""
    with ExitStack() as stack:
        if work.leads:
            stack.enter_context(work.run.lock())
        stack.enter_context(work.stop)
        changes = list_changes(work.run.folder, work.plan, work.prepared, work.resolved) if resume else []
        if changes and not allow_changed:
            # Before any event: a resume that is refused leaves the run as it was.
            raise ResumeError(
                f"{work.run.id}: cannot go on, because this is not as it was: {'; '.join(changes)}",
                hint="start a new run, or insist with --allow-changed",
                details=changes,
            )
        try:
            return _train(work, resume=resume, changes=changes)
        except DiskFullError as error:
            error.hint = f"free some space, then: luthier resume {work.run.folder}"
            with suppress(StorageError):  # the events may lie on the same disk
                _record(work)(events.Paused(_reached(work.run), error.code))
            raise
        except LuthierError as error:
            _record(work)(events.Failed(error.code, error.message))
            raise
        except Exception as error:  # the edge of the run: whatever ends it is told in its events
            _record(work)(events.Failed(LuthierError.code, f"{type(error).__name__}: {error}"))
            raise


def _reached(run: Run) -> int:
    """The step that the events speak of last."""
    return next((int(each["step"]) for each in reversed(run.read_events()) if "step" in each), 0)


def _train(work: Work, *, resume: bool, changes: list[str]) -> Trained:
    watch, plan, store = _record(work), work.plan, _open_store(work)
    watch(events.RunStarted(work.run.id, attempt=_attempt(work), versions=list_versions(plan.spec.engine.kind)))
    watch(events.Planned(plan.as_dict()))
    watch(events.DataReady(_counts(work.prepared), work.prepared.was_cached))
    point = _find_point(work, store, watch, changes) if resume else None
    try:
        with work.stop.at_once():
            engine = _load_engine(work, watch, is_new=point is None)
    except AskedToStop:
        return _stopped_early(work, watch, point)
    try:
        references = _find_references(work, engine, watch)
        if references is None and isinstance(plan.spec.objective, DpoObjective):
            return _stopped_early(work, watch, point)
        loop = find_steps(plan.spec.engine.kind)(
            plan,
            work.prepared,
            engine,
            store,
            watch=watch,
            stop=work.stop,
            share=work.share,
            references=references,
            hear=work.hear,
            facts={"data": data_hash(work.prepared), "plan": plan.hash(), "processes": work.share[1]},
        )
        if point is not None:
            engine.load(point.weights, point.state)
            loop.resume(point.step, point.facts["progress"])
        outcome = loop.run()
        if not outcome.is_done:
            return Trained(outcome, loop.progress, None)
        peak_bytes = _peak_bytes(engine, plan)
        if not work.leads:
            return Trained(outcome, loop.progress, None)
        keep_best(engine, store, plan, loop.progress)
        final = write_results(work.run, plan, work.prepared, work.resolved, engine, loop.progress)
        close_run(work.run, plan, work.home, outcome, loop.progress, peak_bytes, watch)
        return Trained(outcome, loop.progress, final)
    finally:
        engine.close()


def find_steps(kind: str) -> Any:
    """What takes the steps of a run: the loop over an engine's verbs, or a trainer of whole jobs."""
    return importlib.import_module(JOBS[kind]).Job if kind in JOBS else Loop


def _attempt(work: Work) -> int:
    """How many times a process began to work on the run, this time included."""
    return 1 + sum(each["kind"] == events.RunStarted.kind for each in work.run.read_events()) if work.leads else 1


def _peak_bytes(engine: Trainee, plan: RunPlan) -> int:
    """What the plan's memory is held against: on a CPU that of all processes together."""
    peak = float(engine.peak_memory_bytes())
    return int(engine.sum_over_processes(np.array([peak]))[0] if plan.device == "cpu" else peak)


def _record(work: Work) -> Watch:
    """Events go to the run's log, and to whoever watches; only the leading process tells."""

    def watch(event: events.Event) -> None:
        if work.leads:
            work.run.events.append(event)
            work.watch(event)

    return watch


def _open_store(work: Work) -> CheckpointStore:
    keep = work.plan.spec.output.keep_checkpoints
    if keep is None and isinstance(work.plan.spec.method, FullMethod):
        keep = _KEPT_FULL_CHECKPOINTS
    return work.run.checkpoints(keep_weights=keep)


def _counts(prepared: Prepared) -> dict[str, Any]:
    return {name: prepared.summary[name] for name in ("rows", "train", "valid", "dropped", "tokens", "trained_tokens")}


def _find_point(work: Work, store: CheckpointStore, watch: Watch, changes: list[str]) -> ResumePoint | None:
    """The newest whole checkpoint; what has changed although it stands on it is told, because a person insisted."""
    for change in changes:
        watch(events.Warned("changed", f"resumed although changed: {change}"))
    if changes and work.leads:
        accept_changes(work.run, changes, work.plan, work.prepared, work.resolved)
    for change in list_version_changes(work.run.lineage):
        watch(events.Warned("versions", f"{change}: the result may differ in its last digits"))
    point, broken = store.find_newest()
    for each in broken:
        watch(events.CheckpointBroken(str(each.path), each.reason))
    watch(events.Resumed(point.step if point else 0))
    return point


def _load_engine(work: Work, watch: Watch, *, is_new: bool) -> Trainee:
    started = time.monotonic()
    kind = work.plan.spec.engine.kind
    # What is far away tells what it waits for, and what goes on is made from its state.
    more = {"watch": watch, "is_new": is_new} if kind in REMOTE else {}
    engine: Trainee = find_engine(kind)(work.plan, work.resolved, work.home, packed=work.packed, **more)
    facts = engine.facts
    watch(events.EngineLoaded(time.monotonic() - started, facts.is_packed, facts.trainable_parameters, facts.precision))
    for note in facts.notes:
        watch(events.Warned("engine", note))
    if work.packed and facts.packs and not facts.is_packed:
        watch(
            events.Warned(
                "one_segment",
                "this model carries state from one packed segment to the next, so each example is computed alone",
            )
        )
    return engine


def _find_references(work: Work, engine: Trainee, watch: Watch) -> References | None:
    """The reference log-probabilities of DPO; the engine still holds the base's weights."""
    plan = work.plan
    if not isinstance(plan.spec.objective, DpoObjective):
        return None
    folder = work.run.folder / "reference"
    facts = {"data": data_hash(work.prepared), "plan": plan.hash()}
    kept = find_references(folder, facts)
    if kept is not None:
        return kept
    batch, end = plan.spec.optim.batch, plan.stream_end
    positions = plan.steps * batch if end is None else min(plan.steps * batch, end)
    met = {
        int(work.prepared.train[place])
        for step in range(-(-min(positions, plan.train_examples) // batch))
        for place in step_examples(step, plan.train_examples, batch, plan.spec.seed, last=end)
    }
    table = compute_references(
        engine,
        work.prepared,
        met | {int(example) for example in work.prepared.valid},
        Pass(
            "reference",
            plan.spec.compute.micro_batch_tokens or int(work.prepared.example_lengths.max()),
            work.share,
            work.stop,
            watch,
        ),
    )
    if work.leads and table is not None:
        write_references(folder, table, facts)
    return table


def _stopped_early(work: Work, watch: Watch, point: ResumePoint | None) -> Trained:
    """Asked to stop before a step of this process: there is nothing new to save."""
    outcome = Outcome(point.step if point else 0, work.stop.reason or "SIGTERM")
    watch(events.Stopped(outcome.step, outcome.reason))
    return Trained(outcome, Progress(**point.facts["progress"]) if point else Progress(), None)
