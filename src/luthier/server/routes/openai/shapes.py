"""Jobs, events, checkpoints, files and models as OpenAI's API shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.jobs.files import StoredFile, Upload
from luthier.jobs.job import Job, JobEvent, Model, State
from luthier.live.rows import Checkpoint
from luthier.runs.layout import base_label
from luthier.server import spec_view
from luthier.server.results import PURPOSE, render_results, results_id, results_name

STATUS = {
    State.VALIDATING: "validating_files",
    State.QUEUED: "queued",
    State.RUNNING: "running",
    State.PAUSING: "running",
    State.PAUSED: "paused",
    # Nothing but `cancelled` can follow it, and a client that cancels looks for that word in the answer.
    State.CANCELLING: "cancelled",
    State.SUCCEEDED: "succeeded",
    State.FAILED: "failed",
    State.CANCELLED: "cancelled",
}
FILE_STATUS = {"uploaded": "uploaded", "ready": "processed", "error": "error"}
_CODES_OF_DATA = ("invalid_training_file", "data_invalid", "data_rejected", "mask_invalid", "ledger_unbalanced")


def render_job(job: Job) -> dict[str, Any]:
    """A `fine_tuning.job`."""
    is_pairs = spec_view.objective(job) in spec_view.PAIRS
    hyperparameters: dict[str, Any] = {
        "n_epochs": math.ceil(spec_view.epochs(job)),  # the SDK knows whole passes only
        "batch_size": spec_view.batch(job),
        "learning_rate_multiplier": spec_view.rate_multiplier(job),
    }
    kind = "dpo" if is_pairs else "supervised"
    of_method = {**hyperparameters, "beta": spec_view.beta(job)} if is_pairs else hyperparameters
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": int(job.finished_at) if job.finished_at else None,
        "model": job.base,
        "fine_tuned_model": spec_view.shown_model(job),
        "organization_id": job.project,
        "status": STATUS[job.state],
        "hyperparameters": hyperparameters,
        "method": {"type": kind, kind: {"hyperparameters": of_method}},
        "training_file": spec_view.training_file(job),
        "validation_file": job.validation_file,
        "result_files": [results_id(job)] if job.state is State.SUCCEEDED else [],
        "trained_tokens": job.trained_tokens,
        "seed": spec_view.seed(job),
        "estimated_finish": spec_view.estimated_finish(job),
        "integrations": [],
        "metadata": dict(job.metadata),
        "error": render_error(job),
    }


def render_error(job: Job) -> dict[str, Any] | None:
    """Why a job failed."""
    if job.state is not State.FAILED:
        return None
    code = job.error_code or "failed"
    param = "training_file" if code in _CODES_OF_DATA else None
    return {"code": code, "message": job.error_message or "", "param": param}


def event_id(job_id: str, seq: int) -> str:
    """The id of an event, from which its number can be read again."""
    return f"ftevent-{job_id.removeprefix('ftjob-')}-{seq}"


def read_seq(identifier: str) -> int | None:
    """The number in the id of an event or of a checkpoint."""
    last = identifier.rpartition("-")[2]
    return int(last) if last.isascii() and last.isdigit() and len(last) < 16 else None


def render_event(job: Job, event: JobEvent) -> dict[str, Any]:
    """A `fine_tuning.job.event`."""
    metrics = read_metrics(event)
    return {
        "id": event_id(job.id, event.seq),
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": "metrics" if metrics else "message",
        "data": metrics or dict(event.data),
    }


def read_metrics(event: JobEvent) -> dict[str, Any]:
    """The figures of a step or of an evaluation by OpenAI's names; nothing for other events."""
    said = event.data
    if event.kind == "step_done":
        named = {"train_loss": said.get("loss"), "learning_rate": said.get("learning_rate")}
        named |= dict(said.get("metrics") or {})
    elif event.kind == "evaluated":
        named = {"valid_loss": said.get("loss"), "valid_mean_token_accuracy": said.get("token_accuracy")}
    else:
        return {}
    return {"step": event.step, **{key: value for key, value in named.items() if value is not None}}


def checkpoint_id(job_id: str, step: int) -> str:
    """The id of the checkpoint at a step."""
    return f"ftckpt-{job_id.removeprefix('ftjob-')}-{step}"


def render_checkpoint(job: Job, event: JobEvent, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A `fine_tuning.job.checkpoint`; its model can be asked as it stands."""
    step = event.step or 0
    figures = {"step": float(step), **{key: value for key, value in metrics.items() if key in _CHECKPOINT_FIGURES}}
    if "valid_loss" in figures:
        # Every evaluation here is of all held-out rows.
        figures["full_valid_loss"] = figures["valid_loss"]
        figures["full_valid_mean_token_accuracy"] = figures["valid_mean_token_accuracy"]
    return {
        "id": checkpoint_id(job.id, step),
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(event.created_at),
        "fine_tuned_model_checkpoint": checkpoint_model(job, step),
        "fine_tuning_job_id": job.id,
        "step_number": step,
        "metrics": figures,
    }


_CHECKPOINT_FIGURES = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")


def checkpoint_model(job: Job, step: int) -> str:
    """The name by which a checkpoint is asked, once its job has a result."""
    named = f"{job.suffix}:{job.id}" if job.suffix else job.id
    return f"{job.model or f'ft:{base_label(job.base)}:{named}'}:ckpt-step-{step}"


def render_file(file: StoredFile) -> dict[str, Any]:
    """A `file`."""
    shown: dict[str, Any] = {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": FILE_STATUS[file.status],
        "status_details": describe_report(file),
    }
    return shown | ({"expires_at": int(file.expires_at)} if file.expires_at else {})


def describe_report(file: StoredFile) -> str | None:
    """Why a file cannot be used, in one text with the first bad rows."""
    if file.status != "error":
        return None
    report = file.report or {}
    first = [f"line {each.get('line')}: {each.get('message')}" for each in list(report.get("problems") or [])[:5]]
    return "; ".join([str(report.get("message") or "the file cannot be used"), *first])


def render_results_file(job: Job, home: Path) -> dict[str, Any]:
    """The results of a job as a `file`."""
    return {
        "id": results_id(job),
        "object": "file",
        "bytes": len(render_results(home, job)),
        "created_at": int(job.finished_at or job.updated_at),
        "filename": results_name(job),
        "purpose": PURPOSE,
        "status": "processed",
        "status_details": None,
    }


def render_upload(upload: Upload, file: StoredFile | None = None) -> dict[str, Any]:
    """An `upload`, and its file once it is complete."""
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": int(upload.created_at),
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "expires_at": int(upload.expires_at),
        "file": render_file(file) if file else None,
    }


def render_model(model: Model) -> dict[str, Any]:
    """A result as a `model`."""
    return {"id": model.id, "object": "model", "created": int(model.created_at), "owned_by": model.project}


def render_live(found: Checkpoint) -> dict[str, Any]:
    """Weights that a client trained live as a `model`."""
    return {"id": found.ft_id, "object": "model", "created": int(found.created_at), "owned_by": found.project}


def render_base(name: str) -> dict[str, Any]:
    """A base model as a `model`."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "base"}
