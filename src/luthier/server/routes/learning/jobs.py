"""Synth's jobs: made, started, watched and cancelled under `/learning/jobs`, `/sft/jobs` and `/jobs`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import groupby
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from luthier.jobs.job import Job, JobEvent, State
from luthier.jobs.keys import Key
from luthier.jobs.store import JobStore
from luthier.server.auth import Reader, Submitter
from luthier.server.bodies import StrictRoute
from luthier.server.intake import find_job, submit_request
from luthier.server.problems import answers, problem
from luthier.server.routes.learning import shapes
from luthier.server.routes.openai.answers import answer, render_page
from luthier.server.routes.openai.jobs import read_checkpoints
from luthier.server.routes.openai.shapes import read_seq
from luthier.server.service import Service, service_of
from luthier.server.stream import event_stream, parse_last_event_id, sse
from luthier.spec.dialects.synth_wire import EFFECTIVE_CONFIG, build_job

router = APIRouter(tags=["Synth: learning"], route_class=StrictRoute)

DIALECT = "synth"
_SSE = "text/event-stream"
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {_SSE: {"schema": {"type": "string"}}}}}
_PHASES = {"step_done": "train.", "evaluated": "val."}
_LARGEST = 2**53 - 1
_MOST_EVENTS = 1000
_MOST_SCANNED = 1000

JobId = Annotated[str, Path(max_length=64)]


class CreateLearningJob(BaseModel):
    """What Synth's clients send to make a job."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    model: str
    """The base model, or the `ft:` id of an earlier result."""
    training_file_id: str | None = None
    """The id of a file. Some clients call it `training_file`."""
    training_file: str | None = None
    validation_file: str | None = None
    hyperparameters: dict[str, Any] | None = None
    """n_epochs, batch_size, per_device_batch, gradient_accumulation_steps, sequence_length, learning_rate and so on."""
    training_type: str | None = None
    metadata: dict[str, Any] | None = None
    """Labels, and `effective_config` with the tables compute, data and training."""
    suffix: str | None = None


@router.post("/learning/jobs", responses=answers(404, 409, 507))
def create_learning_job(request: Request, key: Submitter, body: CreateLearningJob) -> Response:
    """Make a job. It is queued at once; `metadata.effective_config.compute.gpu_type` must be set."""
    return _create(request, key, body, needs_gpu_type=True)


@router.post("/sft/jobs", responses=answers(404, 409, 507))
def create_sft_job(request: Request, key: Submitter, body: CreateLearningJob) -> Response:
    """Make a job, on whatever the server has."""
    return _create(request, key, body, needs_gpu_type=False)


def _create(request: Request, key: Submitter, body: CreateLearningJob, *, needs_gpu_type: bool) -> Response:
    asked = body.model_dump(exclude_unset=True)
    job = submit_request(request, key, DIALECT, asked, lambda: build_job(asked, needs_gpu_type=needs_gpu_type))
    return answer(shapes.render_job(job))


class JobsAsked(BaseModel):
    """Which jobs, and how many."""

    after: Annotated[str, Field(max_length=200)] | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 20
    status: Annotated[str, Field(max_length=200)] | None = None
    """A word for a state, or several with commas."""
    model: Annotated[str, Field(max_length=300)] | None = None
    """The base model or the result."""
    file_id: Annotated[str, Field(max_length=64)] | None = None
    created_after: float | None = None
    created_before: float | None = None


@router.get("/learning/jobs", responses=answers(404))
@router.get("/sft/jobs", responses=answers(404))
@router.get("/jobs", responses=answers(404))
def list_learning_jobs(request: Request, key: Reader, asked: Annotated[JobsAsked, Query()]) -> Response:
    """Jobs of the project, the newest first."""
    store = service_of(request).jobs
    states = _states_named(asked.status) if asked.status else None
    found = [job for job in _scan(store, key.project, asked.after, states) if _is_asked(job, asked)]
    page = render_page(found[: asked.limit], len(found) > asked.limit, shapes.render_job)
    return answer({**page, "jobs": page["data"]})


def _scan(store: JobStore, project: str, after: str | None, states: Collection[State] | None) -> Iterator[Job]:
    """The newest jobs, page by page, as many as one list looks at."""
    seen = 0
    while seen < _MOST_SCANNED:
        page = store.list_jobs(project, after=after, limit=200, states=states)
        yield from page.items
        if not page.has_more:
            return
        seen, after = seen + len(page.items), page.items[-1].id


def _is_asked(job: Job, asked: JobsAsked) -> bool:
    return (
        (asked.model is None or asked.model in (job.base, job.model))
        and (asked.file_id is None or asked.file_id in (job.training_file, job.validation_file))
        and (asked.created_after is None or job.created_at > asked.created_after)
        and (asked.created_before is None or job.created_at < asked.created_before)
    )


def _states_named(status: str) -> list[State]:
    """The states that the words stand for."""
    words = {word.strip().lower().replace("canceled", "cancelled") for word in status.split(",")}
    if unknown := sorted(words - set(shapes.STATUS.values())):
        known = ", ".join(dict.fromkeys(shapes.STATUS.values()))
        raise problem(400, f"no status `{unknown[0]}`; the words are {known}", param="status")
    return [state for state, word in shapes.STATUS.items() if word in words]


@router.get("/learning/jobs/{job_id}", responses=answers(404))
@router.get("/sft/jobs/{job_id}", responses=answers(404))
@router.get("/jobs/{job_id}", responses=answers(404))
def retrieve_learning_job(request: Request, key: Reader, job_id: JobId) -> Response:
    """One job."""
    return answer(shapes.render_job(find_job(request, key, job_id)))


@router.post("/learning/jobs/{job_id}/start", responses=answers(404))
def start_learning_job(request: Request, key: Submitter, job_id: JobId) -> Response:
    """Nothing is left to do: a job is queued when it is made. Any number of calls is one."""
    return answer(shapes.render_job(find_job(request, key, job_id)))


@router.post("/learning/jobs/{job_id}/cancel", responses=answers(404, 409))
@router.post("/sft/jobs/{job_id}/cancel", responses=answers(404, 409))
@router.post("/jobs/{job_id}/cancel", responses=answers(404, 409))
def cancel_learning_job(request: Request, key: Submitter, job_id: JobId) -> Response:
    """Stop a job for good."""
    find_job(request, key, job_id)
    return answer(shapes.render_job(service_of(request).jobs.cancel(key.project, job_id)))


@router.post("/learning/jobs/{job_id}/pause", responses=answers(404, 409))
def pause_learning_job(request: Request, key: Submitter, job_id: JobId) -> Response:
    """Have a job save its state and wait."""
    return answer(shapes.render_job(service_of(request).jobs.pause(key.project, job_id)))


@router.post("/learning/jobs/{job_id}/resume", responses=answers(404, 409))
def resume_learning_job(request: Request, key: Submitter, job_id: JobId) -> Response:
    """Let a paused job go on."""
    return answer(shapes.render_job(service_of(request).jobs.resume(key.project, job_id)))


@router.get("/learning/jobs/{job_id}/status", responses=answers(404))
@router.get("/jobs/{job_id}/status", responses=answers(404))
def show_status(request: Request, key: Reader, job_id: JobId) -> Response:
    """How far a job is, in a few words."""
    shown = shapes.render_job(find_job(request, key, job_id))
    return answer({name: shown[name] for name in ("job_id", "status", "progress", "updated_at", "fine_tuned_model")})


@router.get("/learning/jobs/{job_id}/config", responses=answers(404))
@router.get("/jobs/{job_id}/config", responses=answers(404))
def show_config(request: Request, key: Reader, job_id: JobId) -> Response:
    """What was asked for, and the run spec that it means."""
    job = find_job(request, key, job_id)
    shown = {
        "job_id": job.id,
        "model": job.base,
        "hyperparameters": shapes.render_hyperparameters(job),
        "metadata": {EFFECTIVE_CONFIG: shapes.render_effective_config(job)},
        "spec": job.spec,
    }
    return answer(shown)


@router.get("/jobs/{job_id}/runs", responses=answers(404))
@router.get("/learning/jobs/{job_id}/runs", responses=answers(404))
def list_runs(request: Request, key: Reader, job_id: JobId) -> Response:
    """The attempts of a job."""
    job = find_job(request, key, job_id)
    runs = [
        {
            "run_id": f"{job.id}-{attempt.number}",
            "job_id": job.id,
            "status": attempt.ending or "running",
            "started_at": shapes.show_time(attempt.started_at),
            "ended_at": shapes.show_time(attempt.ended_at),
            "message": attempt.message,
        }
        for attempt in service_of(request).jobs.attempts(key.project, job_id)
    ]
    return answer({"runs": runs, "data": runs})


class EventsAsked(BaseModel):
    """Events after a number."""

    since_seq: Annotated[int, Field(ge=0, le=_LARGEST)] = 0
    after: Annotated[str, Field(max_length=200)] | None = None
    limit: Annotated[int, Field(ge=1, le=_MOST_EVENTS)] = 200


@router.get("/learning/jobs/{job_id}/events", responses=answers(404) | _STREAM)
@router.get("/sft/jobs/{job_id}/events", responses=answers(404) | _STREAM)
@router.get("/jobs/{job_id}/events", responses=answers(404) | _STREAM)
def list_learning_events(
    request: Request, key: Reader, job_id: JobId, asked: Annotated[EventsAsked, Query()]
) -> Response:
    """Events of a job, the oldest first; as a stream that ends with the job where the client accepts one."""
    service, job = service_of(request), find_job(request, key, job_id)
    if _SSE in request.headers.get("accept", ""):
        start = parse_last_event_id(request)
        return _stream(service, key, job, asked.since_seq if start is None else start)
    found = service.jobs.list_events(key.project, job_id, after_seq=asked.since_seq, limit=asked.limit)
    shown = [shapes.render_event(job, event) for event in found.items]
    return answer({"events": shown, "data": shown, "has_more": found.has_more})


def _stream(service: Service, key: Key, job: Job, after_seq: int) -> Response:
    def render(event: JobEvent) -> bytes:
        now = service.jobs.find(job.project, job.id) if event.kind == "state_changed" else job
        return sse(shapes.render_event(now, event), seq=event.seq)

    return event_stream(service, key, job.id, after_seq=after_seq, render=render)


class MetricsAsked(BaseModel):
    """Which points: of one name or all, after a step."""

    name: Annotated[str, Field(max_length=100)] | None = None
    after_step: Annotated[int, Field(ge=-1, le=_LARGEST)] = -1
    limit: Annotated[int, Field(ge=1, le=_MOST_EVENTS)] = 500
    run_id: Annotated[str, Field(max_length=100)] | None = None
    """Points are of the job, whichever attempt measured them."""


@router.get("/learning/jobs/{job_id}/metrics", responses=answers(404))
@router.get("/jobs/{job_id}/metrics", responses=answers(404))
def list_metrics(request: Request, key: Reader, job_id: JobId, asked: Annotated[MetricsAsked, Query()]) -> Response:
    """Points by step: the loss of training and what was measured on held-out rows."""
    job = find_job(request, key, job_id)
    kinds = [kind for kind in shapes.METRIC_KINDS if asked.name is None or asked.name.startswith(_PHASES[kind])]
    found = service_of(request).jobs.list_events(
        key.project, job_id, kinds=kinds or shapes.METRIC_KINDS, after_step=asked.after_step, limit=asked.limit
    )
    points: list[dict[str, Any]] = []
    for _, events in groupby(found.items, key=lambda event: event.step):
        # A client goes on after the last step it saw, so that a step is never cut in two.
        more = [point for event in events for point in shapes.render_points(job, event)]
        more = [point for point in more if asked.name in (None, point["name"])]
        if points and len(points) + len(more) > asked.limit:
            break
        points += more
    return answer({"job_id": job_id, "points": points, "data": points})


@router.get("/learning/jobs/{job_id}/timeline", responses=answers(404))
@router.get("/jobs/{job_id}/timeline", responses=answers(404))
def show_timeline(
    request: Request, key: Reader, job_id: JobId, limit: Annotated[int, Query(ge=1, le=_MOST_EVENTS)] = 200
) -> Response:
    """The states that a job went through."""
    found = service_of(request).jobs.list_events(
        key.project, job_id, kinds=("job_created", "state_changed"), limit=limit
    )
    phases = shapes.render_phases(found.items)
    return answer({"job_id": job_id, "events": phases, "timeline": phases})


class CheckpointsAsked(BaseModel):
    """Which checkpoints, and how many."""

    after: Annotated[str, Field(max_length=200)] | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 10


@router.get("/sft/jobs/{job_id}/checkpoints", responses=answers(404))
@router.get("/learning/jobs/{job_id}/checkpoints", responses=answers(404))
def list_checkpoints(
    request: Request, key: Reader, job_id: JobId, asked: Annotated[CheckpointsAsked, Query()]
) -> Response:
    """Checkpoints of a job, the newest first."""
    job = find_job(request, key, job_id)
    before = read_seq(asked.after) if asked.after else None
    return answer(read_checkpoints(service_of(request), job, before, asked.limit))
