"""Sessions of `tinker` clients: begun, kept alive, finished, listed and searched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import AwareDatetime, Field

from luthier.live.rows import NewSession, Session
from luthier.live.store import LiveStore
from luthier.server.auth import Reader, Submitter
from luthier.server.bodies import StrictRoute
from luthier.server.problems import answers, problem
from luthier.server.routes.openai.answers import answer
from luthier.server.routes.tinker.shapes import (
    Asked,
    SessionId,
    empty,
    render_metadata,
    render_moment,
    render_status,
    render_summary,
    store_of,
)

router = APIRouter(route_class=StrictRoute, tags=["Tinker: sessions"])

_PAGE = 200
Scope = Annotated[Literal["owned", "accessible"], Query(description="Both are the sessions of the key's project")]


class SessionAsked(Asked):
    """What a client says of itself."""

    tags: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=64)] = []
    user_metadata: dict[str, Any] | None = None
    sdk_version: Annotated[str, Field(max_length=100)] = ""
    project_id: Annotated[str, Field(max_length=200)] | None = None
    display_name: Annotated[str, Field(max_length=200)] | None = None


class Heartbeat(Asked):
    """A client that lives."""

    session_id: Annotated[str, Field(max_length=100)]


class Reason(Asked):
    """How a session ended."""

    type: Literal["success", "errored", "interrupted"] = "success"


class Finish(Asked):
    """The end of a session."""

    reason: Reason = Reason()
    detail: Annotated[str, Field(max_length=10_000)] | None = None


class Assignment(Asked):
    """What a session is to be filed under."""

    project_id: Annotated[str, Field(min_length=1, max_length=200)]


class StatusAsked(Asked):
    """A state that sessions are looked for in."""

    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: list[str] | None = None


class Cursor(Asked):
    """Where the page before ended."""

    last_created_at: AwareDatetime
    last_session_id: Annotated[str, Field(max_length=100)]


class Search(Asked):
    """Which sessions are looked for."""

    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, str] = {}
    display_name: str | None = None
    statuses: list[StatusAsked] | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: Cursor | None = None


@router.post("/create_session")
def create_session(request: Request, key: Submitter, body: SessionAsked) -> Response:
    """Begin a session."""
    new = NewSession(tuple(body.tags), body.user_metadata, body.sdk_version, body.project_id, body.display_name)
    session = store_of(request).create_session(key.project, new)
    messages = dict.fromkeys(("info_message", "warning_message", "error_message"))
    return answer({"type": "create_session", "session_id": session.id, **messages})


@router.post("/session_heartbeat", responses=answers(404, 410))
def keep_alive(request: Request, key: Submitter, body: Heartbeat) -> Response:
    """The client lives; 410 tells it that its session is over."""
    session = store_of(request).touch_session(key.project, body.session_id)
    if session.finished_at is not None:
        raise problem(410, f"the session {session.id} is finished", code="session_finished", hint="begin a new one")
    return answer({"type": "session_heartbeat"})


@router.post("/sessions/search")
def search_sessions(request: Request, key: Reader, body: Search) -> Response:
    """Sessions of the project that fit, the newest first."""
    store = store_of(request)
    found: list[Session] = []
    for session in _fitting(store, key.project, body):
        found.append(session)
        if len(found) > body.limit:
            break
    shown = found[: body.limit]
    cursor = None
    if len(found) > body.limit:
        last = shown[-1]
        cursor = {"last_created_at": render_moment(last.created_at), "last_session_id": last.id}
    return answer({"sessions": [render_summary(store, each) for each in shown], "next_cursor": cursor})


@router.get("/sessions")
def list_sessions(
    request: Request,
    key: Reader,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    offset: Annotated[int, Query(ge=0, le=1 << 40)] = 0,
    access_scope: Scope = "owned",
) -> Response:
    """Ids of sessions, the newest first."""
    found = store_of(request).list_sessions(key.project, offset=offset, limit=limit)
    return answer({"sessions": [session.id for session in found.items]})


@router.get("/sessions/{session}", responses=answers(404))
def show_session(request: Request, key: Reader, session: SessionId, access_scope: Scope = "owned") -> Response:
    """A session with its training runs and samplers."""
    store = store_of(request)
    found = store.find_session(key.project, session)
    runs = store.list_models(key.project, session=session, limit=10_000)
    return answer(
        {
            "training_run_ids": [model.id for model in reversed(runs.items)],
            "sampler_ids": [sampler.id for sampler in store.list_samplers(key.project, session)],
            "user_metadata": render_metadata(found.user_metadata),
            "display_name": found.display_name,
        }
    )


@router.post("/sessions/{session}/finish", responses=answers(404))
def finish_session(request: Request, key: Submitter, session: SessionId, body: Finish) -> Response:
    """The client is done."""
    store_of(request).finish_session(key.project, session, body.model_dump())
    return empty()


@router.put("/sessions/{session}/project", responses=answers(404))
def assign_session(request: Request, key: Submitter, session: SessionId, body: Assignment) -> Response:
    """File a session under a name; who may see it is up to the project of its key."""
    store_of(request).change_session(key.project, session, label=body.project_id)
    return empty()


@router.get("/sessions/{session}/trace_export", responses=answers(404))
def export_trace(request: Request, key: Reader, session: SessionId) -> Response:
    """Refused in the words that the SDK shows: no traces are kept here."""
    store_of(request).find_session(key.project, session)
    return answer({"status": "failed", "url": None, "error": "this server keeps no traces of sessions"})


def _fitting(store: LiveStore, project: str, body: Search) -> Iterator[Session]:
    """Those that fit, read page by page; a session that came meanwhile is before the cursor."""
    is_behind = _behind(body.cursor)
    offset = 0
    while page := store.list_sessions(project, offset=offset, limit=_PAGE).items:
        offset += len(page)
        yield from (session for session in page if is_behind(session) and _fits(session, body))


def _behind(cursor: Cursor | None) -> Callable[[Session], bool]:
    if cursor is None:
        return lambda session: True
    last, name = cursor.last_created_at, cursor.last_session_id

    def is_behind(session: Session) -> bool:
        made = datetime.fromtimestamp(session.created_at, UTC)
        return made < last or (made == last and session.id != name)

    return is_behind


def _fits(session: Session, body: Search) -> bool:
    said = render_metadata(session.user_metadata) or {}
    if body.session_id is not None and session.id != body.session_id:
        return False
    if body.project_ids is not None and (session.label or "") not in body.project_ids:
        return False
    if body.display_name is not None and body.display_name not in (session.display_name or ""):
        return False
    if any(said.get(name) != value for name, value in body.user_metadata.items()):
        return False
    return body.statuses is None or any(_is_in(session, asked) for asked in body.statuses)


def _is_in(session: Session, asked: StatusAsked) -> bool:
    status = render_status(session)
    if status["type"] != asked.type:
        return False
    return asked.reasons is None or (status.get("reason") or {}).get("type") in asked.reasons
