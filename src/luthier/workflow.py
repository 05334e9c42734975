"""What Luthier does, step by step, as the command line and the server call it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.data.prepare import Progress, prepare
from luthier.data.prepared import Prepared
from luthier.data.reasons import list_counts
from luthier.data.rows import ReadOptions
from luthier.data.source import Source
from luthier.errors import DataError
from luthier.runs.home import luthier_home
from luthier.runs.resolve import ResolvedModel, find_resolved, resolve_model
from luthier.runs.run import Run, create_run
from luthier.spec.plan import RunPlan
from luthier.spec.run import RunSpec

if TYPE_CHECKING:
    from luthier.training.loop import Watch
    from luthier.training.session import Trained
    from luthier.training.signals import StopFlag


def read_options(spec: RunSpec, *, with_model: bool = True, any_kind: bool = False) -> ReadOptions:
    """How the spec's rows are read: without a model only as far as text goes; `any_kind` whatever the objective."""
    template = spec.model.chat_template
    return ReadOptions(
        data=spec.data,
        objective=None if any_kind else spec.objective.kind,
        model_folder=resolve_model(spec.model.base, revision=spec.model.revision) if with_model else None,
        chat_template=Path(template) if template else None,
    )


def prepare_data(
    spec: RunSpec,
    *,
    with_model: bool = True,
    any_kind: bool = False,
    split: str | None = None,
    progress: Progress | None = None,
    opened: Source | None = None,
    may_be_empty: bool = False,
) -> Prepared:
    """The spec's rows, checked, split and tokenised into the token cache; found there when nothing changed."""
    options = read_options(spec, with_model=with_model, any_kind=any_kind)
    done = prepare(options, seed=spec.seed, home=luthier_home(), split=split, progress=progress, opened=opened)
    if done.summary["train"] == 0 and not may_be_empty:
        raise nothing_left(done.summary)
    return done


def nothing_left(summary: dict[str, Any]) -> DataError:
    """The error of a run that would train no row at all, with the reasons why."""
    reasons = list_counts(summary["reasons"]) or "all are held out"
    return DataError(
        f"nothing is left to train: of {summary['rows']:,} rows {summary['dropped']:,} were dropped ({reasons})",
        hint="`luthier data check` lists them; data.max_length and data.valid decide most of it",
        details=summary,
    )


@dataclass(frozen=True)
class Ready:
    """A run with everything decided: what will be trained, on which rows, from which model."""

    plan: RunPlan
    prepared: Prepared
    resolved: ResolvedModel


def plan_run(spec: RunSpec, prepared: Prepared) -> RunPlan:
    """The spec with nothing left to decide, and what the run takes; no model is loaded or fetched."""
    from luthier.training.planner import plan_run as plan

    return plan(spec, prepared, resolve_model(spec.model.base, revision=spec.model.revision), luthier_home())


def make_ready(spec: RunSpec, prepared: Prepared) -> Ready:
    """The plan, and the model's weights on this machine."""
    plan = plan_run(spec, prepared)
    return Ready(plan, prepared, find_resolved(spec.model.base, spec.model.revision, with_weights=True))


def start_run(ready: Ready) -> Run:
    """A new run folder for it."""
    parent = Path(ready.plan.spec.output.dir or "runs")
    return create_run(parent, ready.plan, ready.prepared, ready.resolved)


def warm_up(spec: RunSpec) -> None:
    """Import what the engine needs while the data is being read; what goes wrong is said when it is used."""
    from luthier.engines.surroundings import prepare_process

    prepare_process(spec.compute.processes)
    if spec.engine.kind != "torch" or spec.compute.processes > 1:
        return

    def work() -> None:
        for module in ("torch", "transformers.modeling_utils"):
            try:
                import_module(module)
            except ImportError:
                return

    threading.Thread(target=work, name="warm up", daemon=True).start()


def train_run(
    run: Run, ready: Ready, *, watch: Watch, stop: StopFlag, resume: bool = False, allow_changed: bool = False
) -> Trained:
    """Train a run in this process, alone or as one of several; merge at the end where the spec asks for it."""
    from luthier.training.session import Work, train

    share = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    work = Work(run, ready.plan, ready.prepared, ready.resolved, luthier_home(), watch, stop, share)
    trained = train(work, resume=resume, allow_changed=allow_changed)
    if trained.final is not None:
        _write_model_id(run)
        if ready.plan.spec.output.merge:
            trained = replace(trained, merged=merge_run(run, ready.resolved, should_stop=lambda: bool(stop)))
    return trained


def reopen(run: Run) -> Ready:
    """What a run needs to go on, from its own plan."""
    return make_ready(run.spec, prepare_data(run.spec))


def _write_model_id(run: Run) -> None:
    """The `ft:` id, in the file that the spec names for it."""
    from luthier.runs.manifest import write_durably

    if named := run.spec.output.model_id_file:
        write_durably(Path(named), f"{run.model_id}\n".encode())


def merge_run(run: Run, resolved: ResolvedModel, *, should_stop: Callable[[], bool]) -> Path | None:
    """The run's adapter merged into its base, in the run folder; None when asked to stop, or without an adapter."""
    from luthier.adapters.merge import Stopped, merge_adapter
    from luthier.runs.layout import FINAL_LORA_WEIGHTS, MERGED_MODEL

    final = run.final_weights
    if final is None or final.name != FINAL_LORA_WEIGHTS:
        return None
    out = run.folder / MERGED_MODEL
    try:
        merge_adapter(
            resolved.folder, [*(each.path for each in resolved.adapters), final], out, should_stop=should_stop
        )
    except Stopped:
        return None
    return out
