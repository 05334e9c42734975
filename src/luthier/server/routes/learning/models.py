"""Synth's models: the results of the project, under `/learning/models` and `/models`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, Field

from luthier.server.auth import Reader, Submitter
from luthier.server.problems import answers
from luthier.server.routes.learning import jobs as learning_jobs
from luthier.server.routes.learning import shapes
from luthier.server.routes.openai.answers import answer, render_page
from luthier.server.service import service_of

router = APIRouter(tags=["Synth: models"])

ModelName = Annotated[str, Path(max_length=400, description="The `ft:` id of a result")]
_JOBS = "/jobs"


class ModelsAsked(BaseModel):
    """Which results, and how many."""

    after: Annotated[str, Field(max_length=400)] | None = None
    limit: Annotated[int, Field(ge=1, le=10_000)] = 1000
    base_model: Annotated[str, Field(max_length=300)] | None = None
    source: Annotated[str, Field(max_length=100)] | None = None
    """Everything here was made by fine-tuning."""
    status: Annotated[str, Field(max_length=100)] | None = None
    """Everything here is `ready`."""


@router.get("/learning/models", responses=answers(404))
@router.get("/models", responses=answers(404))
def list_models(request: Request, key: Reader, asked: Annotated[ModelsAsked, Query()]) -> Response:
    """Results of the project, the newest first."""
    found = service_of(request).jobs.list_models(key.project, after=asked.after, limit=asked.limit)
    kept = [model for model in found.items if asked.base_model in (None, model.base)]
    page = render_page(kept, found.has_more, shapes.render_model)
    return answer({**page, "models": page["data"]})


@router.get("/learning/models/rl")
@router.get("/models/rl")
def list_rl_models(key: Reader) -> Response:
    """Results of reinforcement learning: none are made here."""
    return answer({**render_page([], False, dict), "models": []})


@router.get("/learning/models/{model:path}", responses=answers(404))
@router.get("/models/{model:path}", responses=answers(404))
def retrieve_model(request: Request, key: Reader, model: ModelName) -> Response:
    """One result; with `/jobs` after its name, the job that made it and those that start from it."""
    if model.endswith(_JOBS):
        asked = learning_jobs.JobsAsked(model=model.removesuffix(_JOBS))
        service_of(request).jobs.find_model(key.project, model.removesuffix(_JOBS))
        return learning_jobs.list_learning_jobs(request, key, asked)
    return answer(shapes.render_model(service_of(request).jobs.find_model(key.project, model)))


@router.delete("/learning/models/{model:path}", responses=answers(404, 409))
@router.delete("/models/{model:path}", responses=answers(404, 409))
def delete_model(request: Request, key: Submitter, model: ModelName) -> Response:
    """Delete a result; its weights and checkpoints are gone from the disk."""
    service_of(request).jobs.delete_model(key.project, model)
    return answer({"id": model, "object": "model", "deleted": True})
