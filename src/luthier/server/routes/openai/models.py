"""`/v1/models`: the base models that this server gives, and the results of the project."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from luthier.errors import NotFoundError
from luthier.live.rows import SAMPLER_WEIGHTS
from luthier.live.store import LiveStore
from luthier.server.auth import Reader, Submitter
from luthier.server.base_models import list_bases
from luthier.server.problems import answers
from luthier.server.routes.openai import shapes
from luthier.server.routes.openai.answers import answer, render_page
from luthier.server.service import service_of

router = APIRouter(tags=["OpenAI: models"])

_MOST = 10_000
ModelName = Annotated[str, Path(max_length=400, description="A base model, or the `ft:` id of a result")]


@router.get("/models")
def list_models(request: Request, key: Reader) -> Response:
    """Everything that `/v1/chat/completions` answers with."""
    service = service_of(request)
    results = [shapes.render_model(model) for model in service.jobs.list_models(key.project, limit=_MOST).items]
    live = LiveStore(service.database, service.home).list_checkpoints(key.project, kind=SAMPLER_WEIGHTS, limit=_MOST)
    bases = [shapes.render_base(name) for name in list_bases(service.settings)]
    return answer(render_page([*results, *map(shapes.render_live, live.items), *bases], False, lambda shown: shown))


@router.get("/models/{model:path}", responses=answers(404))
def retrieve_model(request: Request, key: Reader, model: ModelName) -> Response:
    """One model. Its name may hold slashes and colons as they are."""
    service = service_of(request)
    if model in list_bases(service.settings):
        return answer(shapes.render_base(model))
    if live := service.find_live(key.project, model):
        return answer(shapes.render_live(live))
    return answer(shapes.render_model(service.jobs.find_model(key.project, model)))


@router.delete("/models/{model:path}", responses=answers(404, 409))
def delete_model(request: Request, key: Submitter, model: ModelName) -> Response:
    """Delete a result; its weights and checkpoints are gone from the disk. A base model is not the project's."""
    service = service_of(request)
    if model in list_bases(service.settings):
        raise NotFoundError(f"`{model}` is a base model of the server, not a result of this project")
    if live := service.find_live(key.project, model):
        LiveStore(service.database, service.home).delete_checkpoint(key.project, live.path)
    else:
        service.jobs.delete_model(key.project, model)
    return answer({"id": model, "object": "model", "deleted": True})
