"""Training runs of the project, and what is known of weights."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from luthier.errors import NotFoundError
from luthier.live.published import find_published_model, list_published
from luthier.server.auth import Reader
from luthier.server.bodies import StrictRoute
from luthier.server.problems import answers
from luthier.server.routes.openai.answers import answer
from luthier.server.routes.tinker.sessions import Scope
from luthier.server.routes.tinker.shapes import (
    Asked,
    RunId,
    find_newest,
    render_cursor,
    render_run,
    render_weights,
    store_of,
)

router = APIRouter(route_class=StrictRoute, tags=["Tinker: runs"])


class PathAsked(Asked):
    """Weights by their path."""

    tinker_path: Annotated[str, Field(max_length=1000)]


@router.get("/training_runs")
def list_runs(
    request: Request,
    key: Reader,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    offset: Annotated[int, Query(ge=0, le=1 << 40)] = 0,
    access_scope: Scope = "owned",
    project_id: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """Training runs, the newest first; with `project_id` those of the sessions that are filed under it."""
    store = store_of(request)
    found = store.list_models(key.project, label=project_id, offset=offset, limit=limit)
    shown = [render_run(model, find_newest(store, model)) for model in found.items]
    return answer({"training_runs": shown, "cursor": render_cursor(offset, limit, found.total)})


@router.get("/training_runs/{run}", responses=answers(404))
def show_run(request: Request, key: Reader, run: RunId, access_scope: Scope = "owned") -> Response:
    """One training run; with the scope `accessible` also that of a checkpoint that another project published."""
    store = store_of(request)
    try:
        model = store.find_model(key.project, run)
    except NotFoundError:
        if access_scope == "owned":
            raise
        return answer(render_run(find_published_model(store, run), list_published(store, run)))
    return answer(render_run(model, find_newest(store, model)))


@router.post("/weights_info", responses=answers(404))
def show_weights(request: Request, key: Reader, body: PathAsked) -> Response:
    """The base model, rank and layout of weights: the project's own, or published ones."""
    return answer(render_weights(store_of(request).find_checkpoint(key.project, body.tinker_path)))
