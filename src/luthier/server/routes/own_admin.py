"""What the scope `admin` is for: the keys of a project, and the figures of the server."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.concurrency import run_in_threadpool

from luthier.jobs.keys import KeyRow, create_key, list_keys, revoke_key
from luthier.server.auth import Admin
from luthier.server.bodies import StrictRoute
from luthier.server.own_shapes import Deleted, KeyList, KeyMade, KeyShown, NewKey
from luthier.server.problems import answers
from luthier.server.service import service_of

router = APIRouter(route_class=StrictRoute, tags=["server"])


@router.get("/keys")
def show_keys(request: Request, key: Admin) -> KeyList:
    """The keys of the project, without their secrets."""
    found = list_keys(service_of(request).database, key.project)
    return KeyList.model_construct(keys=[show_key(each) for each in found])


@router.post("/keys", status_code=201)
def make_key(request: Request, key: Admin, body: NewKey) -> KeyMade:
    """Make a key for the project. The answer is the only place where it is shown."""
    database = service_of(request).database
    row, text = create_key(database, key.project, body.scopes, name=body.name, expires_at=body.expires_at)
    return KeyMade(id=row.id, key=text)


@router.delete("/keys/{id}", responses=answers(404))
def delete_key(request: Request, key: Admin, id: Annotated[str, Path(max_length=64)]) -> Deleted:
    """Revoke a key: within a second it opens nothing any more."""
    service = service_of(request)
    revoke_key(service.database, key.project, id)
    service.keyring.forget()
    return Deleted(id=id)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request, key: Admin) -> Response:
    """The figures of this process and of the queue, for Prometheus."""
    found = service_of(request).metrics
    return Response(await run_in_threadpool(found.render), media_type=found.content_type)


def show_key(row: KeyRow) -> KeyShown:
    """A key for its administrator."""
    fields = {name: getattr(row, name) for name in KeyShown.model_fields if name != "scopes"}
    return KeyShown.model_construct(**fields, scopes=sorted(row.scopes))
