"""`/v1/fine_tuning/jobs`: make, watch, pause and cancel jobs; those of other dialects are seen here too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from luthier.jobs.attempt import run_folder
from luthier.jobs.job import Job, JobEvent
from luthier.runs.layout import checkpoint_name
from luthier.server.auth import Reader, Submitter
from luthier.server.bodies import StrictRoute
from luthier.server.intake import count_rows, find_job, submit_request
from luthier.server.problems import answers, problem
from luthier.server.routes.openai import shapes
from luthier.server.routes.openai.answers import PageAsked, answer, render_page
from luthier.server.service import Service, service_of
from luthier.spec.dialects.openai import build_job

router = APIRouter(tags=["OpenAI: fine-tuning"], route_class=StrictRoute)

DIALECT = "openai"
JobId = Annotated[str, Path(max_length=64, description="Id of a job")]
_FILTER = "metadata["

Auto = Literal["auto"]


class Hyperparameters(BaseModel):
    """What a method may be told; `auto` follows from the rows."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    n_epochs: Auto | Annotated[float, Field(gt=0)] | None = None
    """Passes over the rows."""
    batch_size: Auto | Annotated[int, Field(ge=1)] | None = None
    """Examples in one optimizer step."""
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0)] | None = None
    """Times the default learning rate of the method."""
    beta: Auto | Annotated[float, Field(gt=0)] | None = None
    """Of dpo: how strongly the model is held to its reference."""


class MethodPart(BaseModel):
    """The settings of one method."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    hyperparameters: Hyperparameters | None = None


class Method(BaseModel):
    """How the rows are learnt."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    type: str = "supervised"
    """`supervised` or `dpo`."""
    supervised: MethodPart | None = None
    dpo: MethodPart | None = None


class CreateFineTuningJob(BaseModel):
    """A request for a job. `training` and `compute` are Luthier's own, for the SDK's `extra_body`."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    model: str
    """The base model, or the `ft:` id of an earlier result."""
    training_file: str
    """The id of a file."""
    validation_file: str | None = None
    """The id of a file that is measured and never trained."""
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """Where they stood before `method` came."""
    seed: Annotated[int, Field(ge=0)] | None = None
    suffix: Annotated[str, Field(max_length=64)] | None = None
    """Becomes part of the name of the result."""
    metadata: dict[str, str] | None = None
    integrations: list[dict[str, Any]] | None = None
    """Understood, noted, and without effect."""
    training: dict[str, Any] | None = None
    """Tables of a run spec: method, objective, optim, data, evaluate, output."""
    compute: dict[str, Any] | None = None
    """The `[compute]` table of a run spec."""


@router.post("/fine_tuning/jobs", responses=answers(404, 409, 507))
def create_fine_tuning_job(request: Request, key: Submitter, body: CreateFineTuningJob) -> Response:
    """Make a job that trains a model on a file."""
    service = service_of(request)
    asked = body.model_dump(exclude_unset=True)
    rows = count_rows(service, key, body.training_file)
    job = submit_request(request, key, DIALECT, asked, lambda: build_job(asked, rows=rows))
    return answer(shapes.render_job(job))


@router.get("/fine_tuning/jobs", responses=answers(404))
def list_fine_tuning_jobs(request: Request, key: Reader, page: Annotated[PageAsked, Query()]) -> Response:
    """Jobs of the project, the newest first; `metadata[name]=value` or `metadata=null` keeps some of them."""
    wanted = {
        name.removeprefix(_FILTER).removesuffix("]"): value
        for name, value in request.query_params.items()
        if name.startswith(_FILTER)
    }
    found = service_of(request).jobs.list_jobs(
        key.project,
        after=page.after,
        limit=page.limit,
        metadata=wanted,
        without_metadata=request.query_params.get("metadata") == "null",
    )
    return answer(render_page(found.items, found.has_more, shapes.render_job))


@router.get("/fine_tuning/jobs/{job_id}", responses=answers(404))
def retrieve_fine_tuning_job(request: Request, key: Reader, job_id: JobId) -> Response:
    """One job."""
    return answer(shapes.render_job(find_job(request, key, job_id)))


@router.post("/fine_tuning/jobs/{job_id}/cancel", responses=answers(404, 409))
def cancel_fine_tuning_job(request: Request, key: Submitter, job_id: JobId) -> Response:
    """Stop a job for good; what it has trained so far stays in its checkpoints."""
    find_job(request, key, job_id)
    return answer(shapes.render_job(service_of(request).jobs.cancel(key.project, job_id)))


@router.post("/fine_tuning/jobs/{job_id}/pause", responses=answers(404, 409))
def pause_fine_tuning_job(request: Request, key: Submitter, job_id: JobId) -> Response:
    """Have a job save its state and wait."""
    find_job(request, key, job_id)
    return answer(shapes.render_job(service_of(request).jobs.pause(key.project, job_id)))


@router.post("/fine_tuning/jobs/{job_id}/resume", responses=answers(404, 409))
def resume_fine_tuning_job(request: Request, key: Submitter, job_id: JobId) -> Response:
    """Let a paused job go on where it stopped."""
    find_job(request, key, job_id)
    return answer(shapes.render_job(service_of(request).jobs.resume(key.project, job_id)))


@router.get("/fine_tuning/jobs/{job_id}/events", responses=answers(404))
def list_fine_tuning_events(
    request: Request, key: Reader, job_id: JobId, page: Annotated[PageAsked, Query()]
) -> Response:
    """Events of a job, the newest first."""
    job = find_job(request, key, job_id)
    found = service_of(request).jobs.list_events(
        key.project, job_id, newest_first=True, before_seq=_number_of(page.after), limit=page.limit
    )
    return answer(render_page(found.items, found.has_more, lambda event: shapes.render_event(job, event)))


class CheckpointsAsked(PageAsked):
    """Where a list of checkpoints starts, and how long its page is."""

    limit: Annotated[int, Field(ge=1, le=100)] = 10


@router.get("/fine_tuning/jobs/{job_id}/checkpoints", responses=answers(404))
def list_fine_tuning_checkpoints(
    request: Request, key: Reader, job_id: JobId, page: Annotated[CheckpointsAsked, Query()]
) -> Response:
    """Checkpoints of a job, the newest first; each can be asked as a model."""
    service, job = service_of(request), find_job(request, key, job_id)
    return answer(read_checkpoints(service, job, _number_of(page.after), page.limit))


def read_checkpoints(service: Service, job: Job, before_step: int | None, limit: int) -> dict[str, Any]:
    """A page of a job's checkpoints that are there, the newest first; a resumed run may have saved one twice."""
    run = run_folder(service.home, job.id)
    saved = service.jobs.list_events(job.project, job.id, kinds=("checkpoint_saved",), newest_first=True, limit=_MOST)
    by_step: dict[int, JobEvent] = {}
    for event in saved.items:
        if event.step is not None and (before_step is None or event.step < before_step):
            by_step.setdefault(event.step, event)
    steps = [step for step in sorted(by_step, reverse=True) if (run / checkpoint_name(step)).is_dir()]
    return render_page(
        [by_step[step] for step in steps[:limit]],
        len(steps) > limit,
        lambda event: shapes.render_checkpoint(job, event, _figures_at(service, job, event.step or 0)),
    )


_MOST = 10_000


def _figures_at(service: Service, job: Job, step: int) -> dict[str, Any]:
    """What was measured at a step; of a step that was done twice, the later time counts."""
    found = service.jobs.list_events(
        job.project, job.id, kinds=("step_done", "evaluated"), after_step=step - 1, limit=8
    )
    merged: dict[str, Any] = {}
    for event in found.items:
        if event.step == step:
            merged |= shapes.read_metrics(event)
    return merged


def _number_of(after: str | None) -> int | None:
    if after is None:
        return None
    if (number := shapes.read_seq(after)) is None:
        raise problem(400, f"`after` is no id of this list: {after[:100]}", param="after")
    return number
