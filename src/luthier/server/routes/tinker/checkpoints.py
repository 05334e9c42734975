"""Checkpoints that were saved through the service: listed, shared, kept for a time, deleted."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from luthier.errors import ConflictError, NotFoundError
from luthier.jobs.rows import no_such
from luthier.live.published import list_published
from luthier.live.store import LiveStore
from luthier.server.auth import Reader, Submitter
from luthier.server.bodies import StrictRoute
from luthier.server.problems import answers
from luthier.server.routes.openai.answers import answer
from luthier.server.routes.tinker.shapes import (
    Asked,
    CheckpointName,
    Kind,
    RunId,
    empty,
    path_of,
    render_checkpoint,
    render_cursor,
    store_of,
    unreadable_kind,
)

router = APIRouter(route_class=StrictRoute, tags=["Tinker: checkpoints"])

_MOST = 10_000
_TEN_YEARS = 10 * 366 * 86400
_ONE = "/training_runs/{run}/checkpoints/{kind}/{name}"


class Lifetime(Asked):
    """How long a checkpoint is kept from now on; null keeps it."""

    ttl_seconds: Annotated[int, Field(ge=1, le=_TEN_YEARS)] | None = None


@router.get("/checkpoints")
def list_checkpoints(
    request: Request,
    key: Reader,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Annotated[int, Query(ge=0, le=1 << 40)] = 0,
) -> Response:
    """Checkpoints of all runs of the project, the newest first."""
    found = store_of(request).list_checkpoints(key.project, unlike=unreadable_kind(request), offset=offset, limit=limit)
    shown = [render_checkpoint(each) for each in found.items]
    return answer({"checkpoints": shown, "cursor": render_cursor(offset, limit, found.total)})


@router.get("/training_runs/{run}/checkpoints", responses=answers(404))
def list_run_checkpoints(request: Request, key: Reader, run: RunId) -> Response:
    """Checkpoints of one run, the newest first; of another project's run those that it published."""
    store, unlike = store_of(request), unreadable_kind(request)
    try:
        store.find_model(key.project, run)
    except NotFoundError:
        found = [each for each in list_published(store, run) if each.kind != unlike]
    else:
        found = list(store.list_checkpoints(key.project, model=run, unlike=unlike, limit=_MOST).items)
    return answer({"checkpoints": [render_checkpoint(each) for each in found], "cursor": None})


@router.delete(_ONE, responses=answers(404))
def delete_checkpoint(request: Request, key: Submitter, run: RunId, kind: Kind, name: CheckpointName) -> Response:
    """Delete a checkpoint; its files go with the next sweep."""
    store_of(request).delete_checkpoint(key.project, path_of(run, kind, name))
    return empty()


@router.post(f"{_ONE}/publish", responses=answers(404, 409))
def publish_checkpoint(request: Request, key: Submitter, run: RunId, kind: Kind, name: CheckpointName) -> Response:
    """Let every project of this server load and sample a checkpoint by its path."""
    return _share(store_of(request), key.project, path_of(run, kind, name), is_public=True)


@router.delete(f"{_ONE}/publish", responses=answers(404, 409))
def unpublish_checkpoint(request: Request, key: Submitter, run: RunId, kind: Kind, name: CheckpointName) -> Response:
    """Keep it to the project again; what others made from it stays theirs."""
    return _share(store_of(request), key.project, path_of(run, kind, name), is_public=False)


@router.put(f"{_ONE}/ttl", responses=answers(404))
def limit_checkpoint(
    request: Request, key: Submitter, run: RunId, kind: Kind, name: CheckpointName, body: Lifetime
) -> Response:
    """Say how long a checkpoint is kept from now on."""
    store = store_of(request)
    expires_at = None if body.ttl_seconds is None else store.now() + body.ttl_seconds
    store.change_checkpoint(key.project, path_of(run, kind, name), expires_at=expires_at)
    return empty()


def _share(store: LiveStore, project: str, path: str, *, is_public: bool) -> Response:
    found = store.find_checkpoint(project, path)
    if found.project != project:
        raise no_such("checkpoint", path)
    if found.is_public is is_public:
        state = "public already" if is_public else "not public"
        raise ConflictError(f"`{path}` is {state}", hint="`GET /api/v1/checkpoints` shows which are public")
    store.change_checkpoint(project, path, is_public=is_public)
    return empty()
