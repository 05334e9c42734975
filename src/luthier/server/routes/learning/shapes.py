"""Jobs, events, metrics, files and models as Synth's clients read them.

The first keys of a job are those a person sees: the clients print the first 600 characters of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from luthier.jobs.files import StoredFile
from luthier.jobs.job import Job, JobEvent, Model, State
from luthier.server import spec_view
from luthier.server.results import results_id
from luthier.spec.dialects.synth_wire import EFFECTIVE_CONFIG

STATUS = {
    State.VALIDATING: "validating_files",
    State.QUEUED: "queued",
    State.RUNNING: "running",
    State.PAUSING: "running",
    State.PAUSED: "paused",
    State.CANCELLING: "cancelled",  # nothing else can follow it
    State.SUCCEEDED: "succeeded",
    State.FAILED: "failed",
    State.CANCELLED: "cancelled",
}
# `workflow.completed` and `workflow.failed` are the only words for an end that every client knows.
_TYPES_OF_STATES = {
    State.QUEUED: "sft.queued",
    State.RUNNING: "sft.running",
    State.PAUSING: "sft.pausing",
    State.PAUSED: "sft.paused",
    State.CANCELLING: "sft.cancelling",
    State.SUCCEEDED: "workflow.completed",
    State.FAILED: "workflow.failed",
    State.CANCELLED: "sft.cancelled",
}
_TYPES = {
    "job_created": "sft.created",
    "run_started": "sft.training.started",
    "step_done": "sft.progress",
    "evaluated": "sft.validation.summary",
    "checkpoint_saved": "sft.checkpoint.saved",
    "finished": "sft.training.finished",
    "failed": "sft.training.stopped",
}
_NUMBERS = {"loss": "train.loss", "learning_rate": "train.learning_rate", "grad_norm": "train.grad_norm"}
_HELD_OUT = {"loss": "val.loss", "perplexity": "val.perplexity", "token_accuracy": "val.token_accuracy"}
METRIC_KINDS = ("step_done", "evaluated")


def show_time(seconds: float | None) -> str | None:
    """A moment, to the microsecond: clients tell two states apart by it."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")


def render_job(job: Job) -> dict[str, Any]:
    """A job."""
    model = spec_view.shown_model(job)
    failed = job.state is State.FAILED
    return {
        "job_id": job.id,
        "id": job.id,
        "status": STATUS[job.state],
        "fine_tuned_model": model,
        "error": job.error_message if failed else None,
        "error_code": job.error_code if failed else None,
        "model": job.base,
        "base_model": job.base,
        "training_type": job.request.get("training_type") or "sft_offline",
        "progress": render_progress(job),
        "created_at": show_time(job.created_at),
        "updated_at": show_time(job.updated_at),
        "started_at": show_time(job.started_at),
        "finished_at": show_time(job.finished_at),
        "result": {"model_id": model} if model else None,
        "model_id": model,
        "training_file_id": spec_view.training_file(job),
        "training_file": spec_view.training_file(job),
        "validation_file": job.validation_file,
        "hyperparameters": render_hyperparameters(job),
        "trained_tokens": job.trained_tokens,
        "result_files": [results_id(job)] if job.state is State.SUCCEEDED else [],
        "suffix": job.suffix,
        "metadata": {**job.metadata, EFFECTIVE_CONFIG: render_effective_config(job)},
    }


def render_progress(job: Job) -> dict[str, Any]:
    """How far a job is."""
    return {"step": job.step, "total_steps": job.steps, "epoch": spec_view.epoch_at(job, job.step)}


def render_hyperparameters(job: Job) -> dict[str, Any]:
    """The settings by Synth's names: as they came, or what the spec of another dialect says."""
    given = job.request.get("hyperparameters")
    if isinstance(given, dict) and job.dialect == "synth":
        return dict(given)
    optim, data = spec_view.part(job, "optim"), spec_view.part(job, "data")
    shown = {
        "n_epochs": spec_view.epochs(job),
        "batch_size": spec_view.batch(job),
        "learning_rate": optim.get("learning_rate"),
        "warmup_ratio": optim.get("warmup_ratio"),
        "sequence_length": data.get("max_length"),
        "train_kind": spec_view.method(job),
    }
    return {key: value for key, value in shown.items() if value is not None}


def render_effective_config(job: Job) -> dict[str, Any]:
    """The tables that Synth keeps in a job's metadata: as they came, or from the spec of another dialect."""
    metadata = job.request.get("metadata")
    given = metadata.get(EFFECTIVE_CONFIG) if isinstance(metadata, Mapping) else None
    if isinstance(given, dict) and job.dialect == "synth":
        return given
    compute = spec_view.part(job, "compute")
    return {
        "compute": {key: compute[key] for key in ("gpu_type", "gpu_count", "nodes") if compute.get(key) is not None},
        "data": {"topology": {}, **({"validation_files": [job.validation_file]} if job.validation_file else {})},
        "training": {"mode": "sft_offline", "use_qlora": spec_view.method(job) == "qlora"},
    }


def render_event(job: Job, event: JobEvent) -> dict[str, Any]:
    """An event."""
    moved_to = _state_of(event)
    data = dict(event.data)
    if event.step is not None:
        data |= {"step": event.step, "epoch": spec_view.epoch_at(job, event.step)}
    if moved_to is State.SUCCEEDED:
        data["fine_tuned_model"] = job.model
    at = show_time(event.created_at)
    return {
        "seq": event.seq,
        "event_id": f"{job.id}-{event.seq}",
        "job_id": job.id,
        "type": _TYPES_OF_STATES[moved_to] if moved_to else _TYPES.get(event.kind, f"sft.{event.kind}"),
        "message": event.message,
        "level": event.level,
        "data": data,
        "created_at": at,
        "timestamp": at,
    }


def _state_of(event: JobEvent) -> State | None:
    if event.kind != "state_changed":
        return None
    return State(event.data["to"])


def render_points(job: Job, event: JobEvent) -> list[dict[str, Any]]:
    """The figures of a step or of an evaluation, one point each."""
    names = _NUMBERS if event.kind == "step_done" else _HELD_OUT
    phase = "train" if event.kind == "step_done" else "val"
    figures = {name: event.data.get(key) for key, name in names.items()}
    figures |= {f"{phase}.{key}": value for key, value in (event.data.get("metrics") or {}).items()}
    common = {
        "step": event.step,
        "epoch": spec_view.epoch_at(job, event.step),
        "phase": phase,
        "created_at": show_time(event.created_at),
    }
    return [{"name": name, "value": value, **common} for name, value in figures.items() if value is not None]


def render_phases(events: Iterable[JobEvent]) -> list[dict[str, Any]]:
    """The states that a job went through."""
    phases = []
    for event in events:
        state = _state_of(event) or State(event.data["state"])
        # The word for an end stands here once, when it is one.
        word = "cancelling" if state is State.CANCELLING else STATUS[state]
        phases.append(
            {
                "phase": word,
                "message": event.message,
                "metadata": dict(event.data),
                "created_at": show_time(event.created_at),
            }
        )
    return phases


def render_file(file: StoredFile) -> dict[str, Any]:
    """A file; its words are not OpenAI's: clients wait for `ready`, and `processed` is none to them."""
    return {
        "id": file.id,
        "object": "file",
        "status": file.status,
        "filename": file.filename,
        "bytes": file.bytes,
        "purpose": file.purpose,
        "rows": file.rows,
        "report": file.report,
        "sha256": file.sha256,
        "created_at": int(file.created_at),
    }


def render_model(model: Model) -> dict[str, Any]:
    """A result."""
    return {
        "id": model.id,
        "object": "model",
        "base_model": model.base,
        "job_id": model.job,
        "status": "ready",
        "created_at": int(model.created_at),
        "owner": model.project,
    }
