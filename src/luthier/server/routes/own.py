"""Luthier's own routes: jobs from run specs, files by their hash, events as they happen, and results to download."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from luthier.jobs.job import JobEvent, NewJob, State
from luthier.server.auth import Reader, Submitter
from luthier.server.bodies import StrictRoute
from luthier.server.json_text import render_json
from luthier.server.own_shapes import (
    LARGEST,
    Caller,
    Capacity,
    Deleted,
    EventList,
    JobList,
    JobShown,
    ModelList,
    ModelShown,
    NewRun,
    Shape,
    show_event,
    show_job,
)
from luthier.server.problems import answers
from luthier.server.service import service_of
from luthier.server.stream import event_stream, parse_last_event_id, sse
from luthier.server.submit import submit

router = APIRouter(route_class=StrictRoute)
JobId = Annotated[str, Path(max_length=64, description="Id of a job")]
After = Annotated[str | None, Query(max_length=64, description="Id of the last one seen")]
_AGAIN: dict[int | str, dict[str, Any]] = {
    200: {"model": JobShown, "description": "The same request made this job before"}
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A page of events, or with `Accept: text/event-stream` a stream of them",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.post(
    "/jobs",
    status_code=201,
    tags=["jobs"],
    responses=answers(409, 413, 422, 507)
    | {200: {"model": JobShown, "description": "The same request made this job before"}},
    response_model=JobShown,
)
def create_job(
    request: Request,
    key: Submitter,
    body: NewRun,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> Response:
    """Submit a run spec; its files were sent before. With `Idempotency-Key` the same request makes one job."""
    new = NewJob(
        project=key.project,
        dialect="own",
        spec=body.spec,
        request=body.model_dump(),
        suffix=body.suffix,
        metadata=body.metadata,
        priority=body.priority,
    )
    job, was_there = submit(service_of(request), key, new, headers=request.headers)
    return answer(show_job(job), 200 if was_there else 201)


@router.get("/jobs", tags=["jobs"], responses=answers(404), response_model=JobList)
def list_jobs(
    request: Request,
    key: Reader,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    state: Annotated[list[State] | None, Query(max_length=len(State))] = None,
) -> Response:
    """The jobs of the project, the newest first."""
    page = service_of(request).jobs.list_jobs(key.project, after=after, limit=limit, states=state)
    return answer(JobList.model_construct(jobs=[show_job(job) for job in page.items], has_more=page.has_more))


@router.get("/jobs/{job}", tags=["jobs"], responses=answers(404), response_model=JobShown)
def show(request: Request, key: Reader, job: JobId) -> Response:
    """A job as it stands."""
    return answer(show_job(service_of(request).jobs.find(key.project, job)))


@router.delete("/jobs/{job}", tags=["jobs"], responses=answers(404, 409))
def delete_job(request: Request, key: Submitter, job: JobId) -> Deleted:
    """Delete a job that has ended, with its run folder and its result."""
    service_of(request).jobs.delete(key.project, job)
    return Deleted(id=job)


@router.post("/jobs/{job}/cancel", tags=["jobs"], responses=answers(404, 409), response_model=JobShown)
def cancel_job(request: Request, key: Submitter, job: JobId) -> Response:
    """Stop a job for good."""
    return answer(show_job(service_of(request).jobs.cancel(key.project, job)))


@router.post("/jobs/{job}/pause", tags=["jobs"], responses=answers(404, 409), response_model=JobShown)
def pause_job(request: Request, key: Submitter, job: JobId) -> Response:
    """Have a job save and stop, until it is resumed."""
    return answer(show_job(service_of(request).jobs.pause(key.project, job)))


@router.post("/jobs/{job}/resume", tags=["jobs"], responses=answers(404, 409), response_model=JobShown)
def resume_job(request: Request, key: Submitter, job: JobId) -> Response:
    """Put a paused job back into the queue."""
    return answer(show_job(service_of(request).jobs.resume(key.project, job)))


@router.post(
    "/jobs/{job}/resubmit", status_code=201, tags=["jobs"], responses=answers(404, 409, 507), response_model=JobShown
)
def resubmit_job(request: Request, key: Submitter, job: JobId) -> Response:
    """Make a new job of the same spec and files."""
    service = service_of(request)
    old = service.jobs.find(key.project, job)
    new = NewJob(
        project=key.project,
        dialect=old.dialect,
        spec=old.spec,
        request=old.request,
        suffix=old.suffix,
        metadata=old.metadata,
        priority=old.priority,
    )
    headers = {name: value for name, value in request.headers.items() if name == "idempotency-key"}
    return answer(show_job(submit(service, key, new, headers=headers)[0]), 201)


@router.get("/jobs/{job}/events", tags=["jobs"], responses=answers(404) | _STREAM, response_model=EventList)
def list_events(
    request: Request,
    key: Reader,
    job: JobId,
    after_seq: Annotated[int, Query(ge=0, le=LARGEST)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    last_event_id: Annotated[str | None, Header(max_length=100)] = None,
) -> Response:
    """Events in their order: a page, or with `Accept: text/event-stream` all from there on, as they happen.

    A stream ends with `event: end` once the job is final. Whoever connects again with `Last-Event-ID` misses nothing.
    """
    service = service_of(request)
    if "text/event-stream" in request.headers.get("accept", ""):
        service.jobs.find(key.project, job)
        start = parse_last_event_id(request)
        return _stream(request, key, job, after_seq if start is None else start)
    page = service.jobs.list_events(key.project, job, after_seq=after_seq, limit=limit)
    shown = {"events": [show_event(event) for event in page.items], "has_more": page.has_more}
    return Response(render_json(shown), media_type="application/json")


def answer(shown: Shape, status: int = 200) -> Response:
    """An answer that is rendered here, and not checked once more by FastAPI in another thread."""
    return Response(shown.model_dump_json(), status, media_type="application/json")


def _stream(request: Request, key: Reader, job: str, after_seq: int) -> StreamingResponse:
    return event_stream(service_of(request), key, job, after_seq=after_seq, render=_render, end=_end)


def _render(event: JobEvent) -> bytes:
    return sse(show_event(event), seq=event.seq)


def _end(state: str) -> bytes:
    return sse({"state": state}, name="end")


@router.get("/models", tags=["models"], responses=answers(404))
def list_models(
    request: Request,
    key: Reader,
    after: Annotated[str | None, Query(max_length=400)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> ModelList:
    """The results of the project, the newest first."""
    page = service_of(request).jobs.list_models(key.project, after=after, limit=limit)
    shown = [
        ModelShown.model_construct(id=each.id, base=each.base, job=each.job, created_at=each.created_at)
        for each in page.items
    ]
    return ModelList.model_construct(models=shown, has_more=page.has_more)


@router.delete("/models/{model:path}", tags=["models"], responses=answers(404, 409))
def delete_model(
    request: Request, key: Submitter, model: Annotated[str, Path(max_length=400, description="An `ft:` id")]
) -> Deleted:
    """Delete a result: its weights and checkpoints are gone from the disk; the job and its report stay."""
    service_of(request).jobs.delete_model(key.project, model)
    return Deleted(id=model)


@router.get("/capacity", tags=["server"])
def show_capacity(request: Request, key: Reader) -> Capacity:
    """The machines that train, and what jobs may ask for."""
    service = service_of(request)
    workers = [
        {"id": each.id, "capacity": dict(each.capacity), "free": dict(each.free), "seen_at": each.seen_at}
        for each in service.queue.list_workers()
    ]
    unfinished = [State.VALIDATING, State.QUEUED, State.RUNNING, State.PAUSING, State.PAUSED, State.CANCELLING]
    most = service.settings.limits.queued_jobs
    page = service.jobs.list_jobs(key.project, limit=min(most, 10_000), states=unfinished)
    return Capacity(
        workers=workers,
        offers=dict(service.settings.offers),
        allowed_models=list(service.settings.allowed_models),
        unfinished_jobs=len(page.items),
        most_unfinished_jobs=most,
    )


@router.get("/whoami", tags=["server"])
async def whoami(key: Reader) -> Caller:
    """Whose key this is, and what it may."""
    return Caller(project=key.project, scopes=sorted(key.scopes))
